#!/usr/bin/env bash
# The quick tests under other versions: the oldest torch that the metadata allows, the newest that pip finds, and Triton 3.6.
# Outside continuous integration: each makes a virtual environment in build/versions and fetches packages (gigabytes).
#
#   tests/versions.sh [oldest] [newest] [triton]     all three without arguments; PYTEST_FLAGS as in the Makefile
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
oldest=$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
tools=(pytest pytest-timeout pytest-benchmark hypothesis scikit-learn matplotlib setuptools wheel)
needs=(numpy einops safetensors "tyro>=0.9" rich "tomli; python_version < '3.11'")  # what the metadata asks for beside torch

run() {  # run NAME REQUIREMENT...: an environment of its own, the package, the quick tests, one line of what came out
    local place="build/versions/$1" status=0
    shift
    # the caller's || switches errexit off in here
    "${PYTHON:-python3}" -m venv "$place" &&
        "$place/bin/python" -m pip --quiet --disable-pip-version-check install "$@" "${tools[@]}" "${needs[@]}" &&
        "$place/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps --editable . ||
        { echo "versions: $place: cannot be installed; no test was run" >&2; return 1; }
    # Triton's place in torch's own requirements is torch's business; what was asked for is what runs
    # shellcheck disable=SC2086
    OMP_NUM_THREADS=1 "$place/bin/python" -m pytest -q -m "not slow and not gpu" ${PYTEST_FLAGS:-} || status=$?
    "$place/bin/python" - "$status" <<'PY'
import importlib.metadata as metadata, platform, sys
have = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
said = {"0": "passed", "1": "FAILED"}.get(sys.argv[1], f"pytest ended with {sys.argv[1]}")
print(f"versions: Python {platform.python_version()}, torch {have.get('torch')}, triton {have.get('triton', 'none')}: quick tests {said}")
PY
    return "$status"
}

# Triton 3.6, which torch 2.10 asks for, has an interpreter that needs an older numpy than 2.4 (kernels that are compiled do not)
failed=0
for what in "${@:-oldest newest triton}"; do
    for one in $what; do
        case $one in
            oldest) run oldest "torch==$oldest.*" triton "numpy<2.4" ;;
            newest) run newest torch triton ;;
            triton) run triton "torch==$oldest.*" "triton==3.6.*" "numpy<2.4" ;;
            *) echo "versions: expected oldest, newest or triton, got $one" >&2; exit 2 ;;
        esac || failed=1
    done
done
exit $failed
