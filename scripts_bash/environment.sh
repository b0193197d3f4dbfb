# Sourced by the other scripts: a Python environment with requirements-dev.txt, PYTHONPATH at the root of the project.
# An active environment (venv or conda) is used; without one .venv is created. Packages that
# are installed and new enough are kept. PYTHON: another interpreter; VENV: another folder; CONSTRAINTS: a file for pip.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if [[ -n "${VENV:-}" || -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
  VENV=${VENV:-.venv}
  if [[ ! -x $VENV/bin/python ]]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $PYTHON is older than 3.10" >&2; exit 1; }
    "$PYTHON" -m venv "$VENV" || { rm -rf "$VENV"; echo "error: '$PYTHON -m venv' failed" >&2; exit 1; }
  fi
  source "$VENV/bin/activate"
fi

installed="$(python -c 'import sys; print(sys.prefix)')/.rear-requirements"
wanted="$(cat requirements.txt requirements-dev.txt ${CONSTRAINTS:-})"
if [[ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]]; then
  echo "installing requirements-dev.txt (several GB the first time: torch with CUDA)"
  python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt ${CONSTRAINTS:+-c "$CONSTRAINTS"}
  printf '%s\n' "$wanted" > "$installed"
fi
export PYTHONPATH="$PWD"
