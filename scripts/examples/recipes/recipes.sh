#!/usr/bin/env bash
# Run the cookbook's recipes against a server of this tree: sets up .venv-recipes, then runs recipes.py with the
# arguments given. The server runs from .venv-test if it is there (test.sh makes it), else from .venv-quickstart.
# On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (UV_INDEX, where uv is
# installed) gets a torch without CUDA.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

recipes=$root/.venv-recipes
make_venv "$recipes" 3.11
echo "installing (a few minutes the first time)"
install "$recipes" "torch==2.13.0"
# The cookbook asks for a tml-renderers that no index has; only renderers of models that are not served here import it.
install "$recipes" --no-deps "tinker-cookbook==0.6.1"
mapfile -t needed < <("$recipes/bin/python" - <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

extras = ("", "math-rl", "multiplayer-rl")
for each in map(Requirement, requires("tinker-cookbook")):
    if each.name != "tml-renderers" and (each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras)):
        print(f"{each.name}{each.specifier}")
PYTHON
)
# chatterbot-corpus is data; gguf and accelerate let transformers read the model's file for the reference.
install "$recipes" "${needed[@]}" "tinker==0.38.*" "chatterbot-corpus==1.3.3" "gguf>=0.17" "accelerate>=1"

venv=$root/.venv-test
if ! [ -x "$venv/bin/jax_client" ]; then
  venv=$root/.venv-quickstart
  make_venv "$venv" 3.11 3.12 3.13
  install_model "$venv"
  rm -rf "$root/build/lib" # setuptools would pack files that were deleted since
  install "$venv" "$root" "rich>=13" "matplotlib>=3.9"
fi
exec "$venv/bin/python" "$root/scripts/examples/recipes/recipes.py" "$@"
