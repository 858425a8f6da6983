#!/usr/bin/env bash
# Test the tests: change one operator, number or condition of the source at a time (a mutant), and count the changes that
# the tests notice. Arguments are groups of `scripts/mutation/run.py` (losses, head, packing); without any, all of them.
# It makes .venv-mutate (cosmic-ray) and uses .venv-test, which scripts/test.sh makes. One to two hours on 2 cores; a run
# that was stopped goes on where it was, and one with changed sources or tests starts over. Exits with 1 where fewer than
# 95 % of a group's mutants die, or one survives that scripts/mutation/survivors.md does not list.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
cd "$root"

if [ ! -x .venv-test/bin/pytest ]; then
  echo "$root/.venv-test is missing; run 'bash scripts/test.sh' first." >&2
  exit 1
fi
make_venv "$root/.venv-mutate" 3.11 3.12 3.13
install "$root/.venv-mutate" "cosmic-ray==8.7.0"
exec .venv-mutate/bin/python scripts/mutation/run.py "$@"
