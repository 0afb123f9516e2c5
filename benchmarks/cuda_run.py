"""All there is to see on a CUDA machine, in one command: build, tests, sanitizers, benchmark, training.

    python benchmarks/cuda_run.py --out results/cuda --report docs/benchmarks
    python benchmarks/cuda_run.py --out results/cuda --stages bench --limit bench=240
    python benchmarks/cuda_run.py --out results/cuda --stages "" --report docs/benchmarks   # the report anew

Stages, each with a limit in seconds after which it is ended and the next begins:

    build     the extension, in place, for the torch of this environment
    test      the whole suite
    sanitize  compute-sanitizer's tools over `sanitizer_set.py`
    bench     `neighbors.py` in float32 and float64, with the peers that are installed
    train     `examples/train_mlip.py` end to end, and the neighbour list's share of its steps

Logs and a `stage-NAME.json` of each stage go into the output folder as the stages end: a run that is cut off
keeps what it has, and results of several runs can lie in one folder. `summary.json` is all of them together.
`--report` writes a page of Markdown and its plots from that folder alone, on any machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from report import read_summary, write_report

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
DTYPES = ("float32", "float64")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMITS = {"build": 400, "test": 500, "sanitize": 500, "bench": 540, "train": 400}  # seconds
DEVICE_LOST = 3  # what neighbors.py exits with where a peer took the GPU with it


@dataclass
class Ended:
    """How a command ended: "ok", "exit N" or "over N s"; what it printed is in the log."""

    status: str
    seconds: float
    log: Path

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def last_json(self) -> dict:
        """The last line that is a JSON object; {} without one."""
        for line in reversed(self.text().splitlines()):
            if line.startswith("{"):
                return json.loads(line)
        return {}

    def facts(self) -> dict:
        return {"status": self.status, "seconds": round(self.seconds, 1), "log": self.log.name}


class Deadline:
    """Seconds that are left of a stage's limit."""

    def __init__(self, limit: float):
        self.end = time.monotonic() + limit

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)


def run(command: list[str], log: Path, limit: float, **variables: str) -> Ended:
    """Runs `command` in the repository's root, output into `log`; at `limit` ends it and all it started."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables
    start = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        if limit < 1:
            return Ended("no time left", 0.0, log)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            status = f"over {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the group of this process: its session is its own
                process.wait()
    return Ended(status, time.monotonic() - start, log)


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def output_of(*command: str) -> str:
    """What a short command prints, "" where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ------------------------------------------------------------------------------------------- stages


def build(options: argparse.Namespace, deadline: Deadline) -> dict:
    ended = run(python("setup.py", "build_ext", "--inplace"), options.out / "build.log", deadline.left())
    info = run(
        python("-c", "import json, diffnl; print(json.dumps(diffnl.build_info()))"),
        options.out / "build_info.log",
        max(deadline.left(), 60),
    )
    facts = ended.facts()
    if ended.ok and info.ok:
        facts["build_info"] = info.last_json()
        if "cuda" not in facts["build_info"]["backends"]:
            facts["status"] = "no cuda backend"
    elif ended.ok:
        facts["status"] = f"import: {info.status}"
    return facts


def test(options: argparse.Namespace, deadline: Deadline) -> dict:
    """The whole suite: tests that fill the GPU or watch it one by one, then the others beside each other."""
    # pytest-benchmark warns beside xdist, and warnings are errors.
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=8")
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "240"]  # one kernel that hangs must not take the others' results along
    command += options.pytest_args.split()
    alone = [str(path) for path in sorted((ROOT / "tests").glob("test_gpu*.py"))]
    others = ["--ignore-glob", str(ROOT / "tests" / "test_gpu*.py"), str(ROOT / "tests")]
    if importlib.util.find_spec("xdist"):
        others += ["-n", str(min(12, os.cpu_count() or 1))]
    facts: dict = {"status": "ok", "seconds": 0.0, "outcome": {}}
    for name, which in {"test-gpu": alone, "test": others}.items():
        ended = run([*command, *which], options.out / f"{name}.log", deadline.left())
        facts["seconds"] = round(facts["seconds"] + ended.seconds, 1)
        if not ended.ok:
            facts["status"] = f"{name}: {ended.status}"
        for outcome, count in pytest_outcome(ended.text()).items():
            facts["outcome"][outcome] = facts["outcome"].get(outcome, 0) + count
    return facts


def pytest_outcome(text: str) -> dict[str, int]:
    """{"passed": 300, "skipped": 4, ...} from the last line of pytest's output that has such counts."""
    for line in reversed(text.splitlines()):
        counts = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)", line)
        if counts and " in " in line:
            return {name: int(count) for count, name in counts}
    return {}


def sanitize(options: argparse.Namespace, deadline: Deadline) -> dict:
    """The set alone, then under all tools at once; without torch's caching, which hides a block's end."""
    alone = run(
        python(BENCHMARKS / "sanitizer_set.py", "--device", "cuda"),
        options.out / "sanitize-alone.log",
        deadline.left(),
    )
    facts = {"status": alone.status, "seconds": round(alone.seconds, 1), "tools": {}}
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.exists() else None)
    if program is None:
        return facts | {"status": "no compute-sanitizer"}
    if not alone.ok:
        return facts

    def watched(tool: str) -> Ended:
        return run(
            [program, "--tool", tool, "--target-processes", "all", "--print-limit", "10000",
             *python(BENCHMARKS / "sanitizer_set.py", "--device", "cuda")],
            options.out / f"sanitize-{tool}.log",
            deadline.left(),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        results = dict(zip(options.tools, pool.map(watched, options.tools), strict=True))
    for tool, ended in results.items():
        facts["tools"][tool] = ended.facts() | read_sanitizer_log(ended.text(), tool)
        print(f"  {tool}: {facts['tools'][tool]['verdict']} ({ended.seconds:.0f} s)", flush=True)
    longest = max((ended.seconds for ended in results.values()), default=0.0)
    facts["seconds"] = round(facts["seconds"] + longest, 1)
    clean = all(found["verdict"] == "clean" for found in facts["tools"].values())
    return facts | {"status": "ok" if clean else "not clean"}


def read_sanitizer_log(text: str, tool: str) -> dict:
    """What a tool of compute-sanitizer found: "errors" in all, "in_diffnl" in its kernels, and a "verdict".

    Kernels of torch are looked at too, and must be: what they write is then known to be written. initcheck
    does report some of them, so there an error elsewhere is told and not counted, if every one was printed.
    """
    if "Device not supported" in text:
        return {"errors": None, "in_diffnl": None, "verdict": "device not supported by the tool"}
    pattern = r"ERROR SUMMARY: (\d+) errors?"
    if tool == "racecheck":
        pattern = r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, \d+ warnings?\)"
    summaries = [int(count) for count in re.findall(pattern, text)]
    reports = [part for part in re.split(r"^=========\s*$", text, flags=re.M) if located(part)]
    own = [part for part in reports if any("diffnl" in kernel for kernel in located(part))]
    if not summaries:
        verdict = "no summary"
    elif not re.search(r"\d+ lists of \d+ cases right", text):
        verdict = "the set did not come to its end"
    elif sum(summaries) == 0 and not own:
        verdict = "clean"
    elif tool == "initcheck" and not own and len(reports) >= sum(summaries):
        verdict = "clean"
    else:
        verdict = "errors"
    errors = sum(summaries) if summaries else None
    elsewhere = sorted({kernel[:120] for part in reports if part not in own for kernel in located(part)})
    return {"errors": errors, "in_diffnl": len(own), "elsewhere": elsewhere[:5], "verdict": verdict}


def located(report: str) -> list[str]:
    """The kernels that one report of compute-sanitizer names as the place: "at KERNEL+0x60"."""
    lines = [line for line in report.splitlines() if line.startswith("=========")]
    return [kernel for line in lines for kernel in re.findall(r"\bat (.+?)\+0x[0-9a-f]+", line)]


def bench(options: argparse.Namespace, deadline: Deadline) -> dict:
    facts: dict = {"status": "ok", "seconds": 0.0, "runs": {}}
    for k, dtype in enumerate(options.dtypes):
        limit = deadline.left() / (len(options.dtypes) - k)
        share, lost, result = Deadline(limit), [], options.out / f"neighbors-{dtype}.json"
        if not options.resume:
            result.unlink(missing_ok=True)
        command = python(BENCHMARKS / "neighbors.py", "--device", "cuda", "--dtype", dtype, "--json", result)
        command += options.bench_args.split()
        ended = run([*command, "--resume"], options.out / f"bench-{dtype}.log", share.left())
        while ended.status == f"exit {DEVICE_LOST}" and len(lost) < 3:
            lost = json.loads(result.read_text())["lost_to"]
            log = options.out / f"bench-{dtype}-{len(lost)}.log"
            ended = run([*command, "--resume", "--without", ",".join(lost)], log, share.left())
        facts["runs"][dtype] = ended.facts() | {"lost_to": lost}
        facts["seconds"] = round(facts["seconds"] + ended.seconds, 1)
        if not ended.ok:
            facts["status"] = ended.status
        print(ended.tail(14), flush=True)
    return facts


def train(options: argparse.Namespace, deadline: Deadline) -> dict:
    """The example as it is, then one epoch of large batches for the share of the list in those."""
    script = python(ROOT / "examples" / "train_mlip.py", "--device", "cuda", "--profile-layer", "40")
    for flag in ("train", "test"):
        if getattr(options, flag):
            script += [f"--{flag}", str(getattr(options, flag))]
    runs = {
        "train": ["--epochs", str(options.epochs)],
        "train-large": ["--epochs", "1", "--batch-size", "32", "--relax-steps", "1"],
    }
    facts: dict = {"status": "ok", "seconds": 0.0, "runs": {}}
    for name, extra in runs.items():
        command = [*script, "--out", str(options.out / name), *extra]
        ended = run(command, options.out / f"{name}.log", deadline.left())
        share = options.out / name / "layer_share.json"
        facts["runs"][name] = ended.facts() | {"share": None, "command": " ".join(extra)}
        facts["seconds"] = round(facts["seconds"] + ended.seconds, 1)
        if ended.ok and share.exists():
            facts["runs"][name]["share"] = json.loads(share.read_text())
        if name == "train":
            # The table of test errors; the one of the relaxation has a single space there.
            table = r"(test|energy|forces|stress) {2,}"
            facts["table"] = [line for line in ended.text().splitlines() if re.match(table, line)]
        if not ended.ok:
            facts["status"] = ended.status
        print(ended.tail(8), flush=True)
    return facts


STAGES: dict[str, Callable[[argparse.Namespace, Deadline], dict]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
    "train": train,
}


# ------------------------------------------------------------------------------------------ summary


def machine_facts(options: argparse.Namespace) -> dict:
    """The machine and the versions, asked of a process of its own: this one stays off the GPU."""
    question = "import json; from harness import machine; print(json.dumps(machine('cuda', 1)))"
    answer = run(python("-c", question), options.out / "machine.log", 120, PYTHONPATH=str(BENCHMARKS))
    facts = answer.last_json() or {"error": answer.tail(1)}
    facts.pop("threads", None)
    compiler = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    facts["nvcc"] = compiler[1] if compiler else None
    facts["commit"] = options.commit or output_of("git", "rev-parse", "--short", "HEAD") or None
    return facts


def one_line(name: str, facts: dict) -> str:
    """A stage in a line of the table."""
    detail = ""
    if facts.get("outcome"):
        detail = ", ".join(f"{count} {what}" for what, count in facts["outcome"].items())
    if facts.get("tools"):
        detail = ", ".join(f"{tool} {found['verdict']}" for tool, found in facts["tools"].items())
    if facts.get("build_info"):
        detail = f"{','.join(facts['build_info']['backends'])} for {','.join(facts['build_info']['archs'])}"
    if facts.get("runs"):
        detail = ", ".join(f"{run_name} {found['status']}" for run_name, found in facts["runs"].items())
    return f"{name:<10}{facts['status']:<22}{facts['seconds']:>7.1f} s  {detail}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/cuda"), help="folder of logs and numbers")
    add(
        "--stages",
        default=",".join(STAGES),
        help=f"which of {','.join(STAGES)}, in this order (default: all)",
    )
    add("--limit", action="append", default=[], metavar="STAGE=S", help=f"seconds (default: {LIMITS})")
    add(
        "--report",
        type=Path,
        help="write a page from --out: a .md file, or a folder for one named by the GPU",
    )
    add("--tools", default=",".join(TOOLS), help="of compute-sanitizer")
    add("--dtypes", default=",".join(DTYPES), help="of the benchmark")
    add("--bench-args", default="", help="more arguments for neighbors.py")
    add("--resume", action="store_true", help="keep the benchmark's rows that are in --out")
    add("--pytest-args", default="", help="more arguments for pytest")
    add("--train", type=Path, help="for the example: a file of training structures (default: it makes some)")
    add("--test", type=Path, help="likewise, of test structures")
    add("--epochs", type=int, default=40, help="of the example")
    add("--commit", help="what to note as the source's version (default: ask git)")
    options = parser.parse_args(arguments)
    for name, known in (("stages", STAGES), ("tools", TOOLS), ("dtypes", DTYPES)):
        values = [value for value in getattr(options, name).split(",") if value]
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"--{name} must be some of {','.join(known)}, got {','.join(unknown)}")
        setattr(options, name, values)
    limits = dict(LIMITS)
    for entry in options.limit:
        stage, _, seconds = entry.partition("=")
        if stage not in limits or not seconds.isdigit():
            parser.error(f"--limit must be like bench=240, got {entry}")
        limits[stage] = int(seconds)
    options.limit = limits
    # The stages run in the repository's root.
    options.out = options.out.resolve()
    options.train, options.test = (path and path.resolve() for path in (options.train, options.test))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stages:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        machine = {"machine": machine_facts(options), "date": today}
        (options.out / "machine.json").write_text(json.dumps(machine, indent=1))
    for name in [stage for stage in STAGES if stage in options.stages]:
        print(f"== {name} (limit {options.limit[name]} s)", flush=True)
        try:
            facts = STAGES[name](options, Deadline(options.limit[name]))
        except Exception as error:  # a stage that breaks must not cost the others their turn
            facts = {"status": f"{type(error).__name__}: {error}", "seconds": 0.0}
        (options.out / f"stage-{name}.json").write_text(json.dumps(facts, indent=1))
        if facts["status"] != "ok" and "log" in facts:
            print((options.out / facts["log"]).read_text(errors="replace")[-3000:])
        print(one_line(name, facts), flush=True)
    if options.report:
        print(f"wrote {write_report(options.out, options.report)}")
    summary = read_summary(options.out)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print()
    for name, facts in summary["stages"].items():
        print(one_line(name, facts))
    return 0 if all(summary["stages"][name]["status"] == "ok" for name in options.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
