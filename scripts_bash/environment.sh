# Sourced by the other scripts: a Python environment with requirements-dev.txt, PYTHONPATH at the root of the project.
# An active environment (venv or conda) is used; without one .venv is made. Nothing is installed twice.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
  if [[ ! -x .venv/bin/python ]]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $PYTHON is older than 3.11" >&2; exit 1; }
    "$PYTHON" -m venv .venv || { rm -rf .venv; echo "error: '$PYTHON -m venv' failed" >&2; exit 1; }
  fi
  source .venv/bin/activate
fi

installed="$(python -c 'import sys; print(sys.prefix)')/.rear-requirements"
wanted="$(cat requirements.txt requirements-dev.txt)"
if [[ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]]; then
  echo "installing requirements-dev.txt (several GB at the first time: torch with CUDA)"
  python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
  printf '%s\n' "$wanted" > "$installed"
fi
export PYTHONPATH="$PWD"
