#!/usr/bin/env bash
# Set up .venv-test and run every check that a change has to pass: lint, format, types, tests; then, where a Python 3.12
# exists, whose jax and flax are other versions, the tests that compute something and need no torch; and on each Python
# that exists those of how a process ends.
# With --faults instead only the tests of kills, power failures, refused calls, damage and wrong requests, at every
# point: a quarter of an hour, twice that beside other work. With --aot only what XLA's compiler says of TPUs that are not
# here: ten minutes.
# Arguments go to pytest. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (UV_INDEX, where uv is
# installed) gets a torch without CUDA.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
cd "$root"

if [ "${1:-}" = --aot ]; then
  venv=$root/.venv-aot # in any other, jax would find libtpu and look for a TPU
  make_venv "$venv" 3.11 3.12 3.13
  install "$venv" -e ".[aot]" "pytest>=9" "hypothesis>=6"
  exec "$venv/bin/pytest" --aot tests/estimate "${@:2}"
fi

venv=$root/.venv-test
tools=("rich>=13" "matplotlib>=3.9")
make_venv "$venv" 3.11 3.12 3.13
select=()
if [ "$("$venv/bin/python" -c 'import sys; print(sys.version_info[1])')" = 11 ]; then
  install "$venv" "torch==2.13.0"
else
  select=(-m "not torch")
fi
install_model "$venv"
install "$venv" -e ".[dev]" "${tools[@]}"
PATH=$venv/bin:$PATH

if [ "${1:-}" = --faults ]; then
  exec pytest --faults -k "not short" tests/checkpoint/test_{faults,fault_refusals,concurrent_stores,damage}.py \
    tests/server/test_server_fuzz.py tests/server/limits/test_journal_size.py "${@:2}"
fi

ruff check .
ruff format --check .

# Types are checked on an installed copy: in the tree, models/ and losses/ lie outside the package.
rm -rf build/lib build/types
"$venv/bin/python" -m pip install --quiet --no-deps --target build/types .
cp pyproject.toml build/types/
(cd build/types && pyright --pythonpath "$venv/bin/python" jax_client)

# The other environments are made while the first tests run, which leave a core idle now and then. A quick look, not a
# download: without a 3.12 and a 3.13 the first run stands.
others=()
if [ ${#select[@]} = 0 ]; then
  for version in 3.12 3.13; do
    if python_for "$version" >/dev/null; then others+=("$version"); fi
  done
fi
prepare() {
  local version other
  for version in "${others[@]}"; do
    other=$root/.venv-test-${version/./}
    make_venv "$other" "$version"
    install_model "$other"
    install "$other" -e . "${tools[@]}" "pytest>=9" "pytest-xdist>=3.8" "hypothesis>=6"
  done
}
prepare >build/prepare.log 2>&1 &
preparing=$!

# `pytest`, not `python -m pytest`: that would put the tree first on the path, with a jax_client without its models.
# Two processes share the files; each alone would leave a core idle while it compiles. torch's threads are turned off:
# two processes of them, each waiting in a loop for its own, take ten times as long.
export OMP_NUM_THREADS=1
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
pytest "${workers[@]}" "${select[@]}" "$@"

wait "$preparing" || {
  cat build/prepare.log >&2
  exit 1
}
# How a process ends differs between versions of Python; what is computed, between those of jax and flax.
ends=(runs/test_autosave runs/test_exit)
computing=(engine/test_golden engine/test_sharding engine/test_sampler checkpoint/test_checkpoint server/test_server)
for version in "${others[@]}"; do
  files=("${ends[@]}")
  if [ "$version" = 3.12 ]; then files+=("${computing[@]}"); fi
  files=("${files[@]/#/tests/}")
  files=("${files[@]/%/.py}")
  # What a save does to the disk is the same with every jax.
  "$root/.venv-test-${version/./}/bin/pytest" "${workers[@]}" -m "not torch" -k "not at_any_point and not damaged" \
    "${files[@]}" "$@"
done
