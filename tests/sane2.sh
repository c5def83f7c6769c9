#!/usr/bin/env bash
# The whole test suite of sane 2.x on ours, its tables, and its run.py with behavior added. Outside continuous integration:
# it needs a clone of HSG-AIML/WeightCLIP and a Python with what that package asks for (PYTHON=..., default python3).
#
#   tests/sane2.sh CLONE
set -euo pipefail
clone=$(cd "${1:?usage: tests/sane2.sh CLONE}" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$here:$clone/src${PYTHONPATH:+:$PYTHONPATH}"

echo "== its tests, as they are"
(cd "$clone" && "$python" -m pytest tests -q -p no:cacheprovider)
echo "== its tests, on ours"
(cd "$clone" && "$python" -m pytest tests -q -p no:cacheprovider -p wslfast.sane.pytest_patch)
echo "== values beside its own"
(cd "$here" && WSLFAST_SANE_SRC="$clone" "$python" -m pytest tests/sane/v2/test_published.py -q -p no:cacheprovider)
echo "== its run.py, with behavior, on a small zoo"
"$python" -m wslfast zoo build --dataset digits --architecture cnn3 --models 12 --epochs 4 --keep 3 4 --out "$work/zoo"
"$python" -c 'import sys; from wslfast.sane.v2 import export_zoo; export_zoo(sys.argv[1], sys.argv[2])' "$work/zoo" "$work/tree"
(cd "$work" && "$python" "$clone/run.py" --config-dir "$here/examples/sane2" --config-name behavior "zoo=$work/tree" "root_dir=$work/runs")
