"""dvc.yaml names the code that each of its stages uses, as the code's own import statements tell."""

import ast
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml

from stages.align import run as align
from stages.train import run as train

ROOT = Path(__file__).parents[1]
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage)
    for name, stage in ruamel.yaml.YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items()
}

ERRORS = "stages/shard/errors.py"  # that a name or a shard cannot be read ends the stage, whatever it is called
NOT_USED = {
    "embed": ("stages/evaluate/verification.py",),  # it has an exception of it, as features.py has
    "evaluate": (ERRORS,),
    "identify": (ERRORS,),
    "audit": ("stages/evaluate/verification.py",),
    # Of photographs.py it takes the alignment of given files, no listing of folders.
    "extra": (ERRORS, "stages/download/errors.py", "stages/download/archives.py"),
}
"""Files and folders that a stage's modules import, but use nothing of that could change what comes out."""


def file_of(module: str) -> str | None:
    """The file of a module of stages/; None for what is no module."""
    path = Path(*module.split("."))
    return next(
        (str(file) for file in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / file).is_file()), None
    )


def imported(file: str) -> set[str]:
    """Files of stages/ that a file imports: wherever the statement stands, and a package only if something is its own.

    Running a package's __init__.py on the way to a module of it decides nothing.
    """
    modules: list[str] = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import, which this test does not follow"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.append(inner if file_of(inner) else str(node.module))
    return {found for module in modules if module.partition(".")[0] == "stages" and (found := file_of(module))}


def closure(file: str) -> set[str]:
    """A file and all that it imports, directly or not."""
    found, left = set[str](), [file]
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            left += imported(file)
    return found


def code_of(stage: str) -> set[str]:
    """The files of stages/ that a stage's command imports."""
    match = re.match(r"python -m ([\w.]+)", STAGES[stage]["cmd"])
    assert match
    package = file_of(f"{match[1]}.__main__")
    return closure(package or str(file_of(match[1])))


def within(file: str, paths: list[str] | tuple[str, ...]) -> bool:
    return any(Path(file).is_relative_to(path) for path in paths)


def test_imports_are_followed() -> None:
    assert imported("stages/evaluate/__main__.py") == {"stages/evaluate/leaks.py", "stages/evaluate/run.py"}
    assert imported("stages/evaluate/identify.py") >= {"stages/evaluate/leaks.py", "stages/evaluate/figures.py"}
    assert code_of("shard") >= {"stages/shard/__main__.py", "stages/shard/run.py", "stages/shard/hashes.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_uses(stage: str) -> None:
    code, allowed = code_of(stage), NOT_USED.get(stage, ())
    lacking = {file for file in code if not within(file, STAGES[stage]["deps"])}
    assert {file for file in lacking if not within(file, allowed)} == set()
    assert [path for path in allowed if not any(within(file, (path,)) for file in lacking)] == []
    for path in STAGES[stage]["deps"]:
        assert "$" in path or not path.startswith(("stages/", "pipeline/")) or (ROOT / path).exists()


@pytest.mark.parametrize(
    ("package", "code", "aside"),
    [
        ("align", align.CODE, {"earlier", "page"}),
        ("train", train.CODE, {"checkpoint", "launch", "meter", "sheet", "validation"}),
    ],
    ids=["align", "train"],
)
def test_what_is_left_of_other_code_is_of_no_use(package: str, code: tuple[Path, ...], aside: set[str]) -> None:
    """Rows of alignment and checkpoints of training ask for all code that makes them, and for no other."""
    used = {Path(file) for file in closure(f"stages/{package}/run.py") if within(file, (f"stages/{package}",))}
    assert {path.stem for path in code if path.parent.name == package} == {path.stem for path in used} - aside


def test_git_ignores_what_dvc_keeps_and_that_alone(tmp_path: Path) -> None:
    """Or DVC writes a .gitignore of its own, and advises to commit it."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def paths(stage: dict[str, Any], kind: str) -> set[str]:
        named = [next(iter(each)) if isinstance(each, dict) else each for each in stage.get(kind, [])]
        return {path.replace("${item.set}", "lfw").replace("${key}", "lfw") for path in named}

    outs, metrics = (set().union(*(paths(stage, kind) for stage in STAGES.values())) for kind in ("outs", "metrics"))
    for folder in (path for path in outs if not Path(path).suffix):
        (tmp_path / folder).mkdir(parents=True)
    found = subprocess.run(
        ["git", "check-ignore", *outs, *metrics], cwd=tmp_path, capture_output=True, text=True
    ).stdout.split()
    assert set(found) == outs
