# Source this: `source scripts/environment.sh EXTRA` (or "") makes the checkout's virtual environment where there is none,
# installs the package with that extra, if any, and activates it. Run again, it reuses what is there.
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
installed=".venv/.installed-${1:-base}"
if [ ! -e "$installed" ] || [ pyproject.toml -nt "$installed" ]; then
  echo "Installing the package into .venv (torch is large: this can take some minutes) ..."
  python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
  touch "$installed"
fi
