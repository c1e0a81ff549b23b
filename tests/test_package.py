"""The package as installed: command line, version, what an import costs, which way imports run."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dcpo_kernels as dk
from dcpo_kernels import _C, backends, cli
from dcpo_kernels.backends import _compiled

PACKAGE = Path(dk.__file__).parent


def python(code: str, tmp_path: Path, **environment: str) -> str:
    """Output of a fresh interpreter that is not started in the checkout."""
    return subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, env={**os.environ, **environment}
    )


def test_info_says_what_the_compiled_module_says(tmp_path):
    facts = json.loads(
        python("from dcpo_kernels.cli import main; main(['info', '--json'])", tmp_path)
    )
    assert facts["versions"]["dcpo-kernels"] == dk.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["compiled"]["present"]
    assert facts["compiled"]["compiler"] == _C.compiler
    assert facts["compiled"]["cuda"] == _C.cuda == bool(facts["compiled"]["cuda_archs"])
    assert facts["cpu"]["isas"] == _C.cpu_isas()
    assert facts["cpu"]["isa"] in _C.cpu_isas()
    assert facts["backends"] == backends.explain()


def test_info_in_words(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (dk.__version__, torch.__version__, _C.compiler, f"{_C.cpu_isa()} in use"):
        assert word in text
    for row in backends.explain():
        assert f"{row['tensor']} tensors" in text and f"{row['backend']}: {row['reason']}" in text


def test_info_names_a_backend_that_can_not_be_forced(monkeypatch, capsys):
    monkeypatch.setenv("DCPO_KERNELS_BACKEND", "cpu")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "cpu: DCPO_KERNELS_BACKEND=cpu" in text
    assert "none: DCPO_KERNELS_BACKEND: backend='cpu' can't be used for cuda tensors" in text


MODULES = {  # a file beside the package's sources: what is wrong with it
    "": "was never built",
    f"_C{EXTENSION_SUFFIXES[0]}": "can't be loaded (",
    "_C.cpython-39-some-machine.so": "is for another Python (_C.cpython-39-some-machine.so)",
}


@pytest.mark.parametrize("file", MODULES, ids=["never built", "broken", "another Python's"])
def test_plain_pytorch_does_not_stand_in_without_a_word(file, tmp_path):
    """It costs a factor: one warning at the first use that would have been the compiled module's,
    none at the import, nor where the reference is asked for."""
    without = shutil.ignore_patterns("*.so", "bench", "train", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "dcpo_kernels", ignore=without)
    if file:
        (tmp_path / "dcpo_kernels" / file).write_text("no module")
    code = f"""
import sys, warnings
import torch
if {not file.endswith(EXTENSION_SUFFIXES[0])}:  # an editable installation would find another one
    sys.modules["dcpo_kernels._C"] = None
def loss(backend="auto"):
    x = torch.zeros(2, 3, requires_grad=True)
    one = torch.ones(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dk.policy_loss(x, one.long(), -one, one, lengths=[1, 1], backend=backend).loss.backward()
    assert x.grad.abs().sum() > 0
    return caught
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import dcpo_kernels as dk
    from dcpo_kernels.cli import main
assert {str(tmp_path)!r} in dk.__file__, dk.__file__
assert not loss("reference")
(first,) = loss()
assert issubclass(first.category, RuntimeWarning)
assert not loss()
print(first.message)
main(["info"])
"""
    warning, *info = python(
        code, tmp_path, PYTHONPATH=str(tmp_path), DCPO_KERNELS_BACKEND=""
    ).splitlines()
    assert "serves cpu tensors with reference" in warning and MODULES[file] in warning
    assert [line for line in info if line.startswith("compiled module") and MODULES[file] in line]
    assert [line for line in info if f"(cpu not there: the compiled module {MODULES[file]}" in line]


def test_command_without_its_extra_names_the_remedy(monkeypatch, capsys, tmp_path):
    (tmp_path / "needy.py").write_text("import a_package_that_is_missing.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli._COMMANDS, "needy", ("needy", "train", ""))
    assert cli.main(["needy"]) == 1
    error = capsys.readouterr().err
    assert "a_package_that_is_missing" in error and "pip install 'dcpo-kernels[train]'" in error


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_a_build_without_a_compiler_ends_in_one_sentence(compiler, tmp_path):
    """Not in a traceback of ours."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        if not (path := shutil.which(name)):
            pytest.skip(f"{name} is not installed")
        (tools / name).symlink_to(path)
    if compiler == "broken":
        (tools / "c++").write_text("#!/bin/sh\nexit 1\n")
        (tools / "c++").chmod(0o755)
    environment = {key: x for key, x in os.environ.items() if key not in ("CXX", "CUDA_HOME")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(
        [*command, "--build-temp", str(tmp_path / "build")],
        cwd=Path(__file__).parents[1],
        env={**environment, "PATH": str(tools), "DCPO_CUDA": "OFF"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()
    if compiler == "none":
        (said,) = said
        assert said.startswith("dcpo-kernels needs a C++17 compiler")
    else:
        assert said[-1].startswith("dcpo-kernels: CMake found no way to build")


def test_one_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == dk.__version__ == metadata.version("dcpo-kernels")


def test_installs_one_top_level_name():
    """A top-level `kernels` belongs to another project."""
    names = metadata.distribution("dcpo-kernels").read_text("top_level.txt")
    assert names is not None and names.split() == ["dcpo_kernels"]


def test_the_wheel_holds_what_is_no_module(tmp_path):
    """py.typed: type checkers read the annotations of those packages only that have it."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        [*command, "build_py", "--build-lib", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
    )
    for file in ("py.typed", "_C.pyi"):
        assert (tmp_path / "dcpo_kernels" / file).is_file(), file


def test_works_without_numpy(tmp_path):
    """torch does, and nothing here imports it."""
    code = """
import sys
sys.modules["numpy"] = None
import torch
import dcpo_kernels as dk
x = torch.randn(4, 7, requires_grad=True)
old, ids = torch.full((4,), -2.0), torch.arange(4)
advantages = dk.SmoothAdvantage()([1.0, 0.0], ["a", "a"])
out = dk.policy_loss(x, ids, old, advantages, lengths=[2, 2], backend="reference")
out.loss.backward()
print(dk.summarize(out)["tokens"], x.grad.isfinite().all().item())
"""
    assert python(code, tmp_path).split() == ["4.0", "True"]


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121"])
def test_a_torch_too_old_is_one_sentence(version, tmp_path):
    code = f"""
import torch
torch.__version__ = {version!r}
try:
    import dcpo_kernels
except ImportError as error:
    print(error)
"""
    sentence = f"dcpo_kernels needs torch 2.6 or later; this is torch {version}\n"
    assert python(code, tmp_path) == sentence
    assert "torch>=2.6" in (metadata.requires("dcpo-kernels") or [])


def test_import_and_help_stay_light(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import dcpo_kernels
print(*sorted(set(sys.modules) - before))
from dcpo_kernels.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*sorted(set(sys.modules) - before))
"""
    lines = python(code, tmp_path).splitlines()
    package, helped = set(lines[0].split()), set(lines[-1].split())
    assert "dcpo_kernels.losses" in package
    assert "dcpo_kernels.cli" not in package and "dcpo_kernels.cli" in helped
    for name in ("transformers", "triton", "matplotlib", "rich", "pyarrow"):
        assert name not in helped
    for part in ("train", "demo", "bench", "integrations"):
        assert f"dcpo_kernels.{part}" not in helped


# Lowest first: a module imports from its own layer and from those below, never from above.
LAYERS = [
    {"_version", "files", "objective", "presets", "decide", "responses"}
    | {"advantages", "critic", "metrics", "rollout"},
    {"_C", "kernels"},
    {"backends"},
    {"ops"},
    {"losses", "passes", "arguments", "checks", "function", "replay", "__init__"}
    | {"linear", "linear_passes", "vocab_parallel", "beyond_target"}
    | {"parallel", "context", "collectives"},
    {"integrations", "bench", "train", "info"},
    {"demo", "cli"},
]
LAYER = {part: i for i, parts in enumerate(LAYERS) for part in parts}


def source_files() -> list[Path]:
    """Every module of the package, those behind the links too."""
    folders = os.walk(PACKAGE, followlinks=True)
    files = [Path(folder, f) for folder, _, names in folders for f in names if f.endswith(".py")]
    return sorted(file.relative_to(PACKAGE) for file in files)


def imported_parts(file: Path) -> set[str]:
    """The modules and subpackages right under dcpo_kernels that a file imports, at any depth of
    its code; what only a type checker imports is left out."""
    tree = ast.parse((PACKAGE / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    here = ["dcpo_kernels", *file.parent.parts]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) + 1 - node.level] if node.level else []
            module = [*start, *(node.module.split(".") if node.module else [])]
            names += [[*module, alias.name] for alias in node.names]
    ours = [[*name, "__init__"][1] for name in names if name[0] == "dcpo_kernels"]
    # `from dcpo_kernels import policy_loss` takes a name of the package itself
    return {part if part in LAYER else "__init__" for part in ours}


def test_imports_run_one_way():
    wrong = []
    for file in source_files():
        part = file.parts[0].removesuffix(".py")
        assert part in LAYER, f"{part} has no layer yet: give it one in {Path(__file__).name}"
        for other in imported_parts(file) - {part}:
            end = other in ("cli", "demo", "train") and (part, other) != ("demo", "train")
            if LAYER[other] > LAYER[part] or end:
                wrong.append(f"{file} imports {other}")
    assert not wrong


@pytest.mark.parametrize("names", ["SURROGATES", "DIVERGENCES", "CLIPPED", "AGGREGATIONS"])
def test_the_compiled_module_knows_the_codes_by_the_same_names(names, monkeypatch):
    """They cross as numbers, the places of the names: one that moved would be another objective."""
    first, second, *others = getattr(_compiled.objective, names)
    assert _compiled._load() is _C
    for wrong in ((second, first, *others), (first, second, *others, "one-more")):
        monkeypatch.setattr(_compiled.objective, names, wrong)
        with pytest.raises(ImportError, match=f"its {names} are .*{first}"):
            _compiled._load()


def test_a_view_crosses_as_one_tuple():
    given = {"rows": 1, "vocab": 1, "dtype": 2, "x": (0, 1, 0), "factor": 0, "threads": 1}
    with pytest.raises(TypeError, match=r"argument x can't be \(0, 1, 0\)"):
        _C.cpu_multiply(**given)
    with pytest.raises(TypeError, match="missing argument x"):
        _C.cpu_multiply(**{name: value for name, value in given.items() if name != "x"})


needs_gpu = pytest.mark.skipif(not (_C.cuda and torch.cuda.is_available()), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
def test_cuda_devices_are_those_of_torch():
    for i, device in enumerate(_C.cuda_devices()):
        there = torch.cuda.get_device_properties(i)
        assert device["name"] == there.name
        assert device["capability"] == (there.major, there.minor)
        assert device["multiprocessors"] == there.multi_processor_count
        assert device["total_bytes"] == there.total_memory
    assert len(_C.cuda_devices()) == torch.cuda.device_count()
