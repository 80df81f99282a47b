# Source this: `source scripts/environment.sh EXTRA` (or "") makes the checkout's virtual environment where there is none,
# installs the package with that extra, if any, and activates it. Run again, it reuses what is there. PYTHON names the
# interpreter that makes it.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }
binaries() { if [ -d .venv/Scripts ]; then echo .venv/Scripts; else echo .venv/bin; fi; }  # the former on Windows
# `activate` is what venv writes last: without it an earlier attempt broke off.
if [ ! -f "$(binaries)/activate" ] || ! is_recent "$(binaries)/python"; then
  python=${PYTHON:-python3}
  if ! is_recent "$python"; then
    echo "Python 3.10 or newer is needed, and $python is $("$python" --version 2>&1): name one with PYTHON=python3.12 before the command." >&2
    exit 1
  fi
  if [ -e .venv ] && [ ! -f .venv/pyvenv.cfg ]; then
    echo "$PWD/.venv is there, and no environment that venv has made: move it away." >&2
    exit 1
  fi
  "$python" -m venv --clear .venv
fi
source "$(binaries)/activate"
installed=".venv/.installed-${1:-base}"
if [ ! -e "$installed" ] || [ pyproject.toml -nt "$installed" ]; then
  echo "Installing the package into .venv (torch is large: this can take some minutes) ..."
  python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
  touch "$installed"
fi
