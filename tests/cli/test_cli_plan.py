"""`mixtura plan`: its table and JSON, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura.types.placement import Placement

CLUSTER = """
num_nodes: 2
devices_per_node: 2
flops_per_s: 1e12
memory_num_bytes: 1000000000
within: {latency_s: 1e-5, bytes_per_s: 1e10}
between: {latency_s: 5e-5, bytes_per_s: 1e9}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_json_plan_and_page(model: Path, cluster: Path, tmp_path: Path) -> None:
    done = run_mixtura(
        "plan", str(model), "--devices", str(cluster), "--json", "--placements", "contiguous,hecate",
        "--set", "hecate.spare=1", "--save", str(tmp_path / "plan.json"), "--report",
        str(tmp_path / "p.html"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = json.loads(done.stdout)["options"]
    assert {one["placement"] for one in options} == {"contiguous", "hecate"}
    steps = [one["price"]["step_s"] for one in options]
    assert steps == sorted(steps)
    assert steps[0] > 0
    assert Placement.from_json((tmp_path / "plan.json").read_text()).num_devices == 4
    page = (tmp_path / "p.html").read_text()
    assert page.count("<figure") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--placements", "hecat"], "no placement named 'hecat'; did you mean 'hecate'"),
        (["--set", "hecate.spar=1"], "no setting 'spar'; did you mean 'spare'"),
        (["--set", "hecat.spare=1"], "no placement to set named 'hecat'; did you mean 'hecate'"),
        (["--placements", "flexsp"], "does not say how long its sequences are"),
        (["--trace", "none.trace"], "none.trace is not a trace that can be read"),
        (["--save", "nowhere/plan.json"], "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    model: Path, cluster: Path, arguments: list[str], message: str
) -> None:
    done = run_mixtura("plan", str(model), "--devices", str(cluster), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_makes_no_sense_is_refused(model: Path, cluster: Path) -> None:
    cluster.write_text(CLUSTER.replace("num_nodes", "nodes"))
    done = run_mixtura("plan", str(model), "--devices", str(cluster))
    assert done.returncode == 2
    assert "no key of the cluster named 'nodes'; did you mean 'num_nodes'" in done.stderr
