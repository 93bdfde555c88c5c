"""The sdist and the wheel hold what they should, and the wheel works away from the checkout."""

from __future__ import annotations

import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dpo_cli import __version__
from dpo_cli.config.paths import conf_dir, recipes_dir

ROOT = Path(__file__).resolve().parent.parent
YAML_DIRS = {"conf": "dpo_cli/_conf", "recipes": "dpo_cli/_recipes"}  # checkout -> wheel


def files_below(folder: str) -> set[str]:
    """Paths relative to the checkout, without caches."""
    found = (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc")
    return {p.relative_to(ROOT).as_posix() for p in found}


def check_run(
    command: list[str | Path], cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Standard output of a process that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,  # the assertion below shows the output
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel that was built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    check_run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT])
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel; the dependencies are this environment's."""
    venv = tmp_path_factory.mktemp("venv")
    check_run([sys.executable, "-m", "venv", "--without-pip", venv])
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    check_run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel])
    # Paths named in a .pth file have their own .pth files ignored, so an editable
    # install of the checkout in this environment does not show through.
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (packages,) = check_run([python, "-c", query]).splitlines()
    (Path(packages) / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return venv / "bin"


def test_sdist_holds_sources_yaml_tests_and_licence(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = set().union(*map(files_below, ["dpo_cli", "conf", "recipes", "scripts", "tests"]))
    assert expected <= names
    assert {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", ".git/"))]


def test_wheel_holds_the_package_the_yaml_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"dpo_run-{__version__}.dist-info/"
        metadata = archive.read(info + "METADATA").decode()
    expected = files_below("dpo_cli")
    for folder, packaged in YAML_DIRS.items():
        expected |= {packaged + name.removeprefix(folder) for name in files_below(folder)}
    assert {name for name in names if not name.startswith(info)} == expected
    assert info + "licenses/LICENSE" in names
    assert metadata.endswith((ROOT / "README.md").read_text())


def test_installed_package_finds_its_own_yaml(
    installed: Path, tmp_path: Path, clean_env: dict[str, str]
) -> None:
    query = "import dpo_cli.config.paths as p; print(p.__file__, p.conf_dir(), p.recipes_dir())"
    printed = check_run([installed / "python", "-c", query], cwd=tmp_path, env=clean_env)
    module, conf, recipes = map(Path, printed.split())
    assert module.is_relative_to(installed.parent.resolve())
    assert not module.is_relative_to(ROOT)
    assert conf == module.parent.parent / "_conf"
    assert recipes == module.parent.parent / "_recipes"
    assert (conf / "config.yaml").read_bytes() == (ROOT / "conf" / "config.yaml").read_bytes()


def test_checkout_uses_its_top_level_yaml() -> None:
    assert conf_dir() == ROOT / "conf"
    assert recipes_dir() == ROOT / "recipes"


def test_installed_help(installed: Path, tmp_path: Path, clean_env: dict[str, str]) -> None:
    printed = check_run([installed / "dpo-run", "--help"], cwd=tmp_path, env=clean_env)
    assert "stage" in printed
    assert "data" in printed


def test_installed_trains(installed: Path, tmp_path: Path, clean_env: dict[str, str]) -> None:
    overrides = ["stage=sft", "model=tiny", "data=sentiment", "train.max_steps=2", "run_dir=run"]
    check_run([installed / "dpo-run", *overrides], cwd=tmp_path, env=clean_env)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_constraints_pin_every_direct_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [
        Requirement(line) for line in project["dependencies"] + extras["test"] + extras["dev"]
    ]
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line and not line.startswith("#")]  # fmt: skip
    versions = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned
    }
    for requirement in direct:
        if requirement.name != project["name"]:
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier
    assert not [name for name in versions if name.startswith(("nvidia", "cuda", "triton"))]
