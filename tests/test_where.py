"""Where a module is tested: in the file of its name, at the same place under tests/, or where the table below says.

``wslfast/zoo/build.py`` is tested in ``tests/zoo/test_build.py``, ``kernels/layers.py`` in ``tests/kernels/test_layers.py``, and a package's
``__init__.py`` with what it imports. A module that is a part of something larger is tested through that: the table has it on the line of
the file that tests it. A new module needs a test file of its name, or a place here.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# a file of tests: the modules whose tests are in it, and that have no file of their name
TABLE = """
benchmarks/kernels/test_record.py    kernels/triton/sources
cli/test_cli.py                      wslfast/__main__ wslfast/cli/analysis wslfast/cli/console wslfast/cli/doctor wslfast/cli/evaluation
                                     wslfast/cli/options wslfast/cli/training wslfast/cli/zoo wslfast/study/demo
cli/test_first_minutes.py            wslfast/training/progress wslfast/zoo/progress
codes/test_autoencoder.py            wslfast/codes/transformer
codes/test_linear.py                 wslfast/codes/token_groups
engine/test_paths.py                 wslfast/engine/choice
engine/test_ranks.py                 wslfast/zoo/parts
engine/test_trial.py                 wslfast/engine/trial_process
faults/test_backends.py              wslfast/engine/triton_path
faults/test_fuzz.py                  wslfast/safe/state
faults/test_memory.py                wslfast/engine/chunks wslfast/engine/memory
kernels/cpu/test_engine.py           kernels/cpu/program kernels/cpu/queries kernels/cpu/rewrites kernels/cpu/sizes kernels/cpu/steps
kernels/cpu/test_replay.py           kernels/cpu/recording
kernels/stacked/test_image_rules.py  kernels/stacked/sub_pixels kernels/stacked/transposed
kernels/stacked/test_recurrence.py   kernels/stacked/recurrent
kernels/stacked/test_segments.py     kernels/stacked/through
kernels/stacked/test_tape.py         kernels/stacked/norms kernels/stacked/passes kernels/stacked/rule_table
                                     kernels/stacked/rules
kernels/test_hostile_graphs.py       kernels/graph
kernels/test_operations.py           kernels/dtypes kernels/reference kernels/stacked/calls kernels/stacked/forms kernels/stacked/layouts kernels/stacked/product_forms
kernels/test_random_graphs.py        kernels/stacked/compiler kernels/stacked/engine kernels/stacked/leaves kernels/stacked/program
kernels/triton/test_interpreter.py   kernels/triton/activations kernels/triton/convolution kernels/triton/criterion kernels/triton/head
                                     kernels/triton/input_gradients kernels/triton/stages kernels/triton/tiles
                                     kernels/triton/weight_gradients
kernels/triton/test_launch.py        kernels/triton/buffers kernels/triton/devices kernels/triton/launcher
kernels/triton/test_network.py       kernels/triton/budget kernels/triton/network_launch kernels/triton/network_layout
kernels/triton/test_schedule.py      kernels/triton/configurations kernels/triton/packing kernels/triton/tables
measure/test_gradients.py            wslfast/measure/first_order
page/test_page.py                    wslfast/page/drawing wslfast/page/analysis wslfast/page/figures wslfast/page/html wslfast/page/published
                                     wslfast/page/tables
page/test_in_a_browser.py            wslfast/page/finding
permutation/test_groups.py           wslfast/permutation/following wslfast/permutation/layer_rules wslfast/permutation/names
                                     wslfast/permutation/trial wslfast/permutation/values
permutation/test_views.py            wslfast/permutation/axes
sane/test_autoencoder.py             wslfast/sane/feedforward wslfast/sane/state
sane/test_losses.py                  wslfast/sane/behavior wslfast/sane/loss_scale wslfast/sane/structure
sane/test_multizoo.py                wslfast/sane/package_sane
sane/test_patching.py                wslfast/sane/__main__ wslfast/sane/hook wslfast/sane/module wslfast/sane/semantics wslfast/sane/surface
sane/test_tokens.py                  wslfast/sane/checkpoints wslfast/sane/permutations wslfast/sane/probe wslfast/sane/sampling
sane/v2/test_loading.py              wslfast/sane/v2/images wslfast/sane/v2/networks wslfast/sane/v2/zoos
sane/v2/test_patching.py             wslfast/sane/pytest_patch wslfast/sane/v2/classes wslfast/sane/v2/surface wslfast/sane/v2/trainers
sane/v2/test_permutations.py         wslfast/sane/rebasin wslfast/sane/v2/augmentation wslfast/sane/v2/modules
sane/v2/test_tokenizers.py           wslfast/sane/v2/layout wslfast/sane/v2/windows
study/test_ablations.py              wslfast/sane/ablation
study/test_kinds_of_zoos.py          wslfast/page/psnr
study/test_study.py                  wslfast/measure/evaluation wslfast/measure/goals wslfast/study/loaded_zoo
                                     wslfast/study/trained wslfast/study/units
test_architecture.py                 wslfast/tracing/rebuilt
test_behavior.py                     kernels/criteria wslfast/testing
test_hub.py                          wslfast/page/card
test_proof.py                        wslfast/engine/verdicts
test_silent_values.py                wslfast/engine/transforms
tracing/test_tracing.py              wslfast/tracing/convert wslfast/tracing/graph wslfast/tracing/simplify
                                     wslfast/tracing/spelling
training/test_query_sets.py          wslfast/queries/images wslfast/queries/stored wslfast/queries/synthetic
training/test_trainer.py             wslfast/training/checkpoint wslfast/training/config wslfast/training/descent
                                     wslfast/training/records
zoo/importers/test_importers.py      wslfast/zoo/importers/files wslfast/zoo/importers/ray
                                     wslfast/zoo/importers/rows
zoo/importers/test_own.py            wslfast/zoo/export
zoo/test_build.py                    wslfast/zoo/adam wslfast/zoo/grid
zoo/test_catalogue.py                wslfast/zoo/photos
zoo/test_datasets.py                 wslfast/zoo/arrays
zoo/test_fitting.py                  kernels/stacked/training kernels/stacked/training_forms wslfast/engine/training
                                     wslfast/tracing/training wslfast/zoo/signals wslfast/zoo/unfinished
zoo/test_mapped.py                   wslfast/training/models
zoo/test_public_zoos.py              wslfast/zoo/coordinates wslfast/zoo/importers/inr wslfast/zoo/importers/modules wslfast/zoo/importers/small_cnn
zoo/test_store.py                    wslfast/zoo/reading wslfast/zoo/splits
"""


def _table() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    words: list[str] = []
    for word in TABLE.split():
        if word.endswith(".py"):
            words = rows.setdefault(word, [])
        else:
            words.append(word)
    return rows


TESTED_IN = _table()


def _by_name(module: str) -> Path:
    """The test file of a module's name."""
    path = Path(module.removeprefix("wslfast/"))
    return ROOT / "tests" / path.parent / f"test_{path.name}.py"


MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for folder in ("wslfast", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py" and "__pycache__" not in path.parts
)


def test_every_module_has_its_tests_by_name_or_in_the_table() -> None:
    wrong = []
    for module in MODULES:
        files, named = [file for file, modules in TESTED_IN.items() if module in modules], _by_name(module)
        if named.is_file() and files:
            wrong.append(f"{module} has a test file of its name: take it out of the table")
        elif not named.is_file() and len(files) != 1:
            wrong.append(f"{module}: expected {named.relative_to(ROOT)}, or one line of the table")
    assert not wrong, "\n".join(wrong)


def test_the_table_names_what_is_there() -> None:
    assert {module for modules in TESTED_IN.values() for module in modules} <= set(MODULES)
    assert [file for file in TESTED_IN if not (ROOT / "tests" / file).is_file()] == []
