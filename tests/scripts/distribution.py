"""
Builds wheel and sdist, installs the wheel into empty environments, and runs the fast tests on what was installed:

```bash
python tests/scripts/distribution.py outputs/distribution
```

Prints the table of docs/installation.md. The environments have the lower bounds of pyproject.toml, the newest versions
that its bounds allow, and, where the registry has newer ones, these by force. torch is the one of constraints.txt in
all of them. Needs Python 3.11, git and about 3 GB; the environments are deleted when they have been tried.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UPSTREAM = ("trl", "transformers", "diffusers", "peft", "accelerate", "datasets", "huggingface-hub")
TEST_TOOLS = ("hypothesis", "pytest", "pytest-timeout", "tensorboard")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTHONPATH")} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def run(*command: str | Path, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, **kwargs)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done


def tracked() -> list[str]:
    """The files that git knows, those of this moment."""
    return [name for name in run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / name).is_file()]


def copy_files(names: list[str], folder: Path) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist, of the files that git knows and no others."""
    venv.create(folder / "build", with_pip=True)
    run(folder / "build/bin/pip", "install", "build")
    source = copy_files(tracked(), folder / "source")
    run(folder / "build/bin/python", "-m", "build", "--outdir", folder / "dist", source)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    package = {name for name in tracked() if name.startswith("trl_diffusion/")}
    expected = {"trl_diffusion/py.typed", "trl_diffusion/accelerate_configs/zero3.yaml"}
    assert expected | {"trl_diffusion/bench/models/sdxl.json"} <= package
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    assert found == package, f"the wheel differs in {sorted(found ^ package)}"
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    missing = package | {"LICENSE", "README.md", "pyproject.toml"}
    assert missing <= inside, f"the sdist lacks {sorted(missing - inside)}"
    assert not [name for name in inside if name.startswith(("tests/", "examples/"))]
    print(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size / 1e3:.0f} kB; {sdist.name}\n", flush=True)


def lower_bounds() -> list[str]:
    """`name==version` for each direct dependency with a lower bound; torch is not among them."""
    pins = []
    for requirement in map(Requirement, PROJECT["dependencies"]):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if bounds and requirement.name != "torch":
            pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


class Environment:
    """An empty environment with the wheel in it."""

    def __init__(self, folder: Path, wheel: Path, torch: str, pins: list[str] | None = None):
        self.folder = folder
        self.constraints = folder.with_suffix(".txt")
        self.constraints.write_text(torch + "\n")
        venv.create(folder, with_pip=True)
        # No source distribution is accepted: nothing is compiled.
        self.pip("install", "--only-binary", ":all:", str(wheel), *(pins or []))
        self.pip("install", f"{wheel}[demo]", *TEST_TOOLS)
        assert "torchvision" not in self.versions()

    def pip(self, *words: str) -> str:
        options = ["-c", str(self.constraints)] if words[0] == "install" else []
        return run(self.folder / "bin/pip", *words, *options).stdout

    def versions(self) -> dict[str, str]:
        return {
            part["name"].lower().replace("_", "-"): part["version"]
            for part in json.loads(self.pip("list", "--format", "json"))
        }

    def newest(self, names: tuple[str, ...]) -> dict[str, str]:
        """What the registry has, without regard to what anybody requires."""
        report = self.pip(
            "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", *names
        )
        found = [part["metadata"] for part in json.loads(report)["install"]]
        return {part["name"].lower().replace("_", "-"): part["version"] for part in found}

    def test(self, workplace: Path, options: list[str]) -> str:
        """Runs the fast tests; the package is the installed one."""
        python, report = self.folder / "bin/python", self.folder.with_suffix(".xml")
        where = run(python, "-c", "import trl_diffusion; print(trl_diffusion.__file__)", cwd=workplace).stdout
        assert Path(where).is_relative_to(self.folder), where
        command = [python, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = run(*command, *options, cwd=workplace, check=False)
        self.folder.with_suffix(".log").write_text(done.stdout + done.stderr)
        if not report.is_file():
            return f"did not start: {done.stderr.strip().splitlines()[-1]}"
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
        tests, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
        failed += int(suite.get("errors", 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                print(f"failed: {case.get('classname')}::{case.get('name')}", flush=True)
        return (
            f"{tests - failed - skipped} passed, {failed} failed, {skipped} skipped, {float(suite.get('time')):.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where all of it is made")
    parser.add_argument("--only", choices=["lower", "newest"], help="one of the two environments")
    parser.add_argument("--tests", nargs="+", default=[], help="test files (all of them)")
    args = parser.parse_args()
    folder = args.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))

    wheel, sdist = build(folder)
    check_contents(wheel, sdist)
    workplace = copy_files([n for n in tracked() if not n.startswith("trl_diffusion/")], folder / "workplace")

    columns: dict[str, dict[str, str]] = {}

    def record(name: str, environment: Environment) -> None:
        found, result = environment.versions(), environment.test(workplace, args.tests)
        columns[name] = {part: found[part] for part in (*UPSTREAM, "torch")} | {"fast tests": result}
        print(f"{name}: {columns[name]}", flush=True)

    if args.only != "newest":
        environment = Environment(folder / "lower", wheel, torch, lower_bounds())
        record("lower bounds", environment)
        shutil.rmtree(environment.folder)
    if args.only != "lower":
        environment = Environment(folder / "newest", wheel, torch)
        record("newest allowed", environment)
        installed, newest = environment.versions(), environment.newest(UPSTREAM)
        behind = [f"{name}=={newest[name]}" for name in UPSTREAM if installed[name] != newest[name]]
        if behind:
            environment.pip("install", "--no-deps", *behind)
            record("newest by force", environment)
        shutil.rmtree(environment.folder)

    rows = (*UPSTREAM, "torch", "fast tests")
    print("\n| | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(columns[name][row] for name in columns) + " |")
    print(f"\nPython {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
