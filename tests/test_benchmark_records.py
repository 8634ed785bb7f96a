"""Records of benchmarks say where they come from; they compare; pictures show what they hold."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'resm_kernels[plot]'")

from benchmarks import compare, figures, overview, plot, records, roofline, suite

MACHINE = {
    "cpu": "made up",
    "isa": "avx2",
    "cores": 2,
    "threads": 2,
    "memory_bytes_per_second": {"read": 40e9, "copy": 30e9},
    "gemm_flops_per_second": {"torch.float32": 2e11, "torch.float64": 1e11},
}


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes a second."""
    monkeypatch.setattr(records, "rates", lambda threads: {"gemm_flops_per_second": {"torch.float32": 1.0}})


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


def repository(folder: Path) -> Path:
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "docs").mkdir()
    for name in ("code.py", "docs/page.md"):
        (folder / name).write_text("1\n")
    (folder / "benchmarks" / "results" / "live.json").write_text("{}\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


# ----------------------------------------------------------------------------------------------------- provenance


def test_commit_says_whether_files_differ_that_figures_depend_on(tmp_path: Path) -> None:
    root = repository(tmp_path / "repository")
    clean = records.commit(root)
    assert clean is not None and len(clean) == 40
    (root / "untracked.txt").write_text("2\n")
    (root / "benchmarks" / "results" / "live.json").write_text("[]\n")
    (root / "docs" / "page.md").write_text("2\n")
    assert records.commit(root) == clean
    (root / "code.py").write_text("2\n")
    assert records.commit(root) == f"{clean}+changes"
    assert overview.short(f"{clean}+changes") == f"{clean[:10]}+changes"
    assert overview.age(root, clean) == "0" and overview.age(root, "0" * 40) == "not in this history"
    # A copy of the sources within another repository, and none at all.
    assert records.commit(root / "benchmarks") is None
    assert records.commit(tmp_path) is None


def test_a_record_is_written_whole_with_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--json", f"{records.ROOT}/build/x.json", "two words"])
    file = tmp_path / "deep" / "live.json"
    recording = records.Recording(file, "rich")
    assert not file.exists()
    recording.save({"rows": [1]})
    assert [f.name for f in file.parent.iterdir()] == ["live.json"]
    record = json.loads(file.read_text())
    assert record.pop("rows") == [1]
    provenance = record.pop("provenance")
    assert not record
    assert provenance["command"].endswith("--json build/x.json 'two words'")
    assert provenance["versions"].keys() >= {"resm_kernels", "python", "torch", "rich"}
    assert provenance["machine"].keys() >= {"cpu", "isa", "cores", "threads", "memory_bytes", "compiler", "system"}
    assert provenance["machine"]["gemm_flops_per_second"] == {"torch.float32": 1.0}
    assert provenance["commit"] == records.commit(records.ROOT)


def test_what_a_record_needs_is_missed_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="folder cannot be made"):
        records.Recording(tmp_path / "file" / "x.json")
    with pytest.raises(SystemExit, match="no-such-peer is not installed"):
        records.Recording(None, "no-such-peer")


def test_the_overview_names_what_depends_on_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n[x](benchmarks/results/live.json)\n`python -m benchmarks.bench_live`\n`bench_lively`\n")
    assert overview.dependants("live", {}, [page]) == ["page.md:2", "page.md:3"]
    page.write_text("![](benchmarks/results/quality_calibrated.png)\n`make quality RECORD=calibrated-confirmation`\n")
    assert overview.dependants("quality_calibrated", {}, [page]) == ["page.md:1"]
    assert overview.dependants("quality_calibrated_confirmation", {}, [page]) == ["page.md:2"]
    facts = {"commit": "a" * 40, "date": "2026-01-02T03:04:05+00:00", "seconds": 90, "machine": MACHINE, "command": ""}
    for name in ("live", "ray"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": facts}))
    assert overview.main(["--folder", str(tmp_path), "--same-commit"]) == 0
    assert "2026-01-02 03:04" in capsys.readouterr().out
    (tmp_path / "ray.json").write_text(json.dumps({"provenance": facts | {"commit": "b" * 40}}))
    assert overview.main(["--folder", str(tmp_path)]) == 0
    assert overview.main(["--folder", str(tmp_path), "--same-commit"]) == 1
    assert "aaaaaaaaaa, bbbbbbbbbb" in capsys.readouterr().err
    assert overview.main(["--folder", str(tmp_path), "--same-commit", "ray"]) == 0


# ------------------------------------------------------------------------------------------------------ comparing


def live(later: list[float], files: list[float], kept: float = 2e9, **machine: Any) -> dict[str, Any]:
    """A record of merges in memory."""
    ratio = sorted(files)[len(files) // 2] / sorted(later)[len(later) // 2]
    row = {"name": "ties", "first": 1.0, "live": later, "files": files, "ratio": ratio, "kept_bytes": kept}
    return {"provenance": {"machine": MACHINE | machine}, "rows": [row]}


QUIET = live([1.0, 1.01, 1.02], [3.0, 3.0, 3.0])


def verdicts(before: dict[str, Any], after: dict[str, Any], across: bool = False) -> dict[str, str]:
    found, _ = compare.changes({"live": before}, {"live": after}, across)
    return {change.before.name.removeprefix("ties, "): change.verdict for change in found}


def test_figures_move_by_more_than_noise_in_their_own_direction() -> None:
    assert set(verdicts(QUIET, QUIET).values()) == {"same"}
    slower = live([1.3, 1.31, 1.32], [3.0, 3.0, 3.0])
    worse = {"later merge": "worse", "first merge": "same", "from files ÷ in memory": "worse", "kept": "same"}
    assert verdicts(QUIET, slower) == worse
    better = {name: "better" if verdict == "worse" else verdict for name, verdict in worse.items()}
    assert verdicts(slower, QUIET) == better
    # The same medians from a run whose repetitions lay far apart prove nothing.
    loud = live([1.0, 1.31, 1.7], [3.0, 3.0, 3.0])
    assert set(verdicts(QUIET, loud).values()) == {"same"}
    # Without repetitions 15 % of time and 5 % of memory are noise.
    once = live([1.0], [3.0])
    assert verdicts(once, live([1.2], [3.6]))["later merge"] == "same"
    assert verdicts(once, live([1.3], [3.9]))["later merge"] == "worse"
    assert verdicts(once, live([1.0], [3.0], kept=2.2e9))["kept"] == "worse"


def test_errors_that_leave_zero_are_worse() -> None:
    zero = figures.Figure("error", 0.0, "error")
    assert compare.Change("x", zero, figures.Figure("error", 1e-9, "error")).verdict == "worse"
    assert compare.Change("x", zero, zero).verdict == "same"


def test_other_machines_compare_by_ratios_alone() -> None:
    other = live([2.0, 2.0, 2.0], [6.0, 6.0, 6.0], cpu="another")
    assert verdicts(QUIET, other) == {}
    assert verdicts(QUIET, other, across=True) == {"from files ÷ in memory": "same"}
    unnamed = {"rows": QUIET["rows"]}
    assert verdicts(unnamed, unnamed) == {} and verdicts(unnamed, unnamed, across=True)


def test_the_command_says_by_its_status_whether_something_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, record in (("a", QUIET), ("b", live([1.5, 1.5, 1.5], [3.0, 3.0, 3.0])), ("c", live([1], [3], cpu="x"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "live.json").write_text(json.dumps(record))
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert compare.main([a, f"{b}/live.json"]) == 1
    out = capsys.readouterr().out
    assert "later merge" in out and "+49%" in out and "first merge" not in out
    assert compare.main([b, a, "--all"]) == 0
    assert "first merge" in capsys.readouterr().out
    assert compare.main([a, c]) == 2
    assert compare.main([a, c, "--across-machines"]) == 0
    capsys.readouterr()
    for wrong, message in (
        ("nowhere", "neither a file, nor a folder, nor a revision"),
        (str(tmp_path), "no record there"),
    ):
        assert compare.main([a, wrong]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "c" / "live.json").write_text('{"rows": [{}]}')
    assert compare.main([a, c, "--across-machines"]) == 2
    assert "live: the record has not today's layout" in capsys.readouterr().out
    (tmp_path / "c" / "live.json").write_text("{")
    assert compare.main([a, c]) == 2


def test_revisions_stand_for_their_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path)
    results = root / "benchmarks" / "results"
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "RESULTS", results)
    (results / "live.json").write_text(json.dumps(QUIET))
    git(root, "commit", "-qam", "two")
    (results / "live.json").write_text(json.dumps(live([2.0, 2.0], [3.0, 3.0])))
    git(root, "commit", "-qam", "three")
    assert compare.read("HEAD~1") == {"live": QUIET}
    assert compare.main(["HEAD~1", "HEAD"]) == 1
    assert compare.main(["HEAD", str(results)]) == 0


NAMES = sorted(file.stem for file in records.RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_every_record_has_figures_and_says_where_they_come_from(name: str) -> None:
    record = json.loads((records.RESULTS / f"{name}.json").read_text())
    assert figures.figures_of(name, record)
    facts = record[records.PROVENANCE]
    # A machine with a GPU may have a copy of the sources without their history.
    assert facts["commit"] is None or re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert facts["command"].startswith("python -m ") and facts["machine"]["cores"]


# ------------------------------------------------------------------------------------------------------- pictures


def cpu(factor: float = 1.0) -> dict[str, Any]:
    """A record of many ops, close together."""
    rows = []
    for i in range(14):
        work = {"operations": 1e9 * (1 + i / 9) ** 4, "bytes": 4e8, "dtype": "torch.float32", "threads": 1 + i % 2}
        row = {"group": f"long_name_of_an_op_{i} 64x64", "name": "bench", "median_ms": factor * (30 + 3 * i)}
        rows.append(row | {"work": work})
    return {"provenance": {"machine": MACHINE}, "benchmarks": [*rows, {"group": "peer", "name": "bench_torch"}]}


def test_labels_of_the_roofline_do_not_overlap() -> None:
    shown = roofline.of_cpu(cpu())
    assert shown is not None and len(shown.points) == 14
    assert shown.points[0].rate == pytest.approx(1e9 / 30e-3) and shown.points[0].one_thread
    figure = roofline.draw(shown)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    names = [t for t in figure.axes[0].texts if t.get_text().startswith("long")]
    boxes = [type(t).get_window_extent(t, renderer) for t in names]
    texts = [super(type(t), t).get_window_extent(renderer) for t in names]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])


def test_a_gpus_roofline_has_the_rows_with_both_rates() -> None:
    names = ("aggregate sum, triton", "square of 64², project", "square of 64², torch.mm", "resm, q 64×64")
    rows: list[dict[str, Any]] = [{"name": "copy", "TB/s": 4.0}, *({"name": n, "TB/s": 2.0} for n in names)]
    for row in rows[1:4]:
        row["TFLOP/s"] = 50.0
    shown = roofline.of_gpu({"provenance": {"machine": {"gpu": ["made up"]}}, "rows": rows})
    assert shown.points == (roofline.Point("aggregate", 25.0, 5e13), roofline.Point("project", 25.0, 5e13))
    assert shown.bandwidths == {"memory, copied": 4e12} and shown.rates == {"torch.mm in fp32": 5e13}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_picture_knows_what_it_shows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = plot.PICTURES["roofline_cpu.svg"]
    name = f"ops.{kind}"
    monkeypatch.setattr(plot, "PICTURES", {name: picture})
    folder = ["--folder", str(tmp_path)]
    assert plot.main(folder) == 0 and not (tmp_path / name).exists()
    (tmp_path / "cpu.json").write_text(json.dumps(cpu()))
    assert plot.main([*folder, "--check"]) == 1
    assert plot.main(folder) == 0
    assert plot.main([*folder, "--check"]) == 0
    drawn = (tmp_path / name).read_bytes()
    assert plot.main(folder) == 0 and (tmp_path / name).read_bytes() == drawn
    (tmp_path / "cpu.json").write_text(json.dumps(cpu(2.0)))
    assert plot.outdated(tmp_path) == [name]


def test_pictures_show_their_records() -> None:
    assert plot.outdated(records.RESULTS) == []
    assert (records.RESULTS / "speed.svg").stat().st_size <= 150_000


def test_every_picture_of_the_pages_is_drawn_from_records() -> None:
    pages = [records.ROOT / "README.md", *(records.ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    results = {file.name for file in records.RESULTS.iterdir() if file.suffix in (".png", ".svg")}
    assert results <= plot.PICTURES.keys()
    assert {name for name in results if f"results/{name}" in text}


# ---------------------------------------------------------------------------------------------------------- suites

BENCHMARKS = [b for benchmarks in suite.SUITES.values() for b in benchmarks if b.module != suite.KERNELS]
QUICK = ("precision", "truncated_svd", "fused_experts", "accuracy", "live")
"""What takes a second or so when it is run here; the others start processes, or import a peer."""


class Began(Exception):
    """All that is before the measurement has passed."""


@pytest.mark.parametrize("tried", BENCHMARKS, ids=[b.record for b in BENCHMARKS])
def test_benchmarks_take_the_arguments_of_their_suite(
    tried: suite.Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tried.record == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install 'resm_kernels[ray]'")
    module = importlib.import_module(f"benchmarks.{tried.module}")

    def begin(file: Path, *peers: str) -> None:
        assert file == tmp_path / f"{tried.record}.json"
        raise Began

    monkeypatch.setattr(module, "Recording", begin)
    monkeypatch.setattr(
        module.torch if hasattr(module, "torch") else sys, "set_num_threads", lambda n: None, raising=False
    )
    for cache in (None, tmp_path):
        monkeypatch.setattr(sys, "argv", tried.command(tmp_path, cache)[2:])
        with pytest.raises(Began):
            module.main()


@pytest.mark.parametrize("tried", [b for b in BENCHMARKS if b.record in QUICK], ids=lambda b: b.record)
def test_benchmarks_write_records_with_figures(
    tried: suite.Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    module = importlib.import_module(f"benchmarks.{tried.module}")
    monkeypatch.setattr(sys, "argv", tried.command(tmp_path, tmp_path / "cache")[2:])
    if hasattr(module, "gemm_rates"):
        monkeypatch.setattr(module, "gemm_rates", lambda: {"torch.float32": 1e9, "torch.float64": 1e9})
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / f"{tried.record}.json").read_text())
    assert figures.figures_of(tried.record, record)


def test_kernels_write_a_record_with_their_work(tmp_path: Path) -> None:
    (kernels,) = (b for b in suite.SUITES["kernels"] if b.module == suite.KERNELS)
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which it knows by these variables.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = kernels.command(tmp_path, tmp_path)
    done = subprocess.run(command, cwd=records.ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["provenance"]["command"].startswith("python -m pytest benchmarks/bench_spd_solve.py")
    assert list(figures.figures_of("cpu", record)) == [
        "spd_solve 64, 192 rows: spd_solve[64, 192 rows]",
        "spd_solve 64, 192 rows: spd_solve[64, 192 rows] ÷ yardstick",
    ]
    shown = roofline.of_cpu(record)
    assert shown is not None and [p.op for p in shown.points] == ["spd_solve"]


def test_a_suite_goes_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks = [suite.Benchmark("no_such_module", name, 1) for name in ("one", "two")]
    assert suite.run(benchmarks, tmp_path, tmp_path) == ["one", "two"]
    out = capsys.readouterr().out
    assert "1 of 2: one" in out and "two: FAILED in 0." in out
