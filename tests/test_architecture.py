"""Rules that hold for all source files, read as syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "gmp").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "server",
    "aiohttp",
    "folder_paths",
    "nodes",
    "execution",
}
# Code from files, the process's random numbers, and torch's process-wide settings
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "pickle.load", "pickle.loads", "torch.hub.load",
    "torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all",
    "torch.random.manual_seed", "torch.set_rng_state", "torch.set_num_threads",
    "torch.set_num_interop_threads", "torch.set_default_dtype", "torch.set_default_device",
    "torch.set_grad_enabled", "torch.set_float32_matmul_precision", "torch.set_printoptions",
    "torch.use_deterministic_algorithms", "torch.autograd.set_detect_anomaly", "random.seed",
    "np.random.seed", "numpy.random.seed", "os.chdir", "os.system", "warnings.filterwarnings",
    "warnings.simplefilter", "logging.basicConfig", "matplotlib.use", "plt.switch_backend",
}  # fmt: skip
GLOBAL_RANDOM = {
    "torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli",
    "torch.multinomial", "torch.rand_like", "torch.randn_like", "torch.randint_like",
}  # fmt: skip
RANDOM_METHODS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> set[str]:
    """Names of imported modules; a relative import is no foreign one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def faults(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            seeded = any(keyword.arg == "generator" for keyword in node.keywords)
            random = name in GLOBAL_RANDOM or name.rpartition(".")[2] in RANDOM_METHODS
            if name in FORBIDDEN_CALLS or (random and not seeded):
                found.append(f"line {node.lineno}: {name}()")
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [dotted(target) for target in targets]
            found += [f"line {node.lineno}: {n} = " for n in names if n.startswith(("torch.backends", "torch._dynamo"))]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            found += [f"line {node.lineno}: import {m}" for m in modules & {"pickle", "marshal", "shelve", "dill"}]
    return found


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_read():
    assert len(ENGINE) > 25 and ROOT / "gmp" / "run.py" in ENGINE


@pytest.mark.parametrize("path", ENGINE, ids=name_of)
def test_the_engine_does_not_know_the_host(path):
    assert not {module.partition(".")[0] for module in imports(parse(path))} & HOST


@pytest.mark.parametrize("path", ENGINE, ids=name_of)
def test_the_engine_imports_itself_relatively(path):
    """It lives inside a node pack whose package has any name."""
    assert "gmp" not in {module.partition(".")[0] for module in imports(parse(path))}


@pytest.mark.parametrize("path", ENGINE + NODES, ids=name_of)
def test_nothing_runs_code_from_files_or_changes_the_process(path):
    assert faults(parse(path)) == []


@pytest.mark.parametrize("path", NODES, ids=name_of)
def test_only_two_files_know_the_host(path):
    names = {module.partition(".")[0] for module in imports(parse(path))}
    if path.name != "routes.py":
        assert not names & {"aiohttp", "server"}
    if path.name != "host.py":
        assert not names & {"comfy", "folder_paths"}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "eval('1')", "exec(text)", "torch.manual_seed(0)", "import pickle",
        "from pickle import loads", "torch.backends.cudnn.benchmark = True", "x = torch.randn(3)",
        "weight.normal_(0, 1)", "random.seed(1)", "torch.set_num_threads(1)",
    ],
)  # fmt: skip
def test_faults_are_found(line):
    assert faults(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "generator = torch.Generator().manual_seed(0)", "torch.randn(3, generator=g)",
        "weight.normal_(0, 1, generator=g)", "model.eval()", "json.load(file)", "re.compile('a')",
    ],
)  # fmt: skip
def test_harmless_lines_are_not(line):
    assert not faults(ast.parse(line))


def test_imports_are_found():
    tree = ast.parse("import comfy.sd\nfrom server import x\nfrom . import run\ndef f():\n    import aiohttp")
    assert imports(tree) == {"comfy.sd", "server", "aiohttp"}


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import gmp, gmp.files, gmp.layouts.detect; "
        "print([m for m in ('torch', 'numpy', 'PIL', 'safetensors', 'matplotlib') if m in set(sys.modules) - before])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
