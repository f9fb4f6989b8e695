"""What the first minutes on GPUs check, on results as parts leave them."""

from pathlib import Path
from typing import Any

import pytest

from llm.bench.first_minutes import COLUMNS, NETWORK, failed_checks, table
from llm.common.files import write_json


def ranks(devices: int, **changed: Any) -> list[dict[str, Any]]:
    facts = {"device": "NVIDIA H200", "open_files": 300, "peak_bytes": 35 * 2**30}
    return [
        {"host": f"n{rank // 8}", "process": 100 + rank, "device_id": f"GPU-{rank}", **facts} | changed
        for rank in range(devices)
    ]


def result(part: str, devices: int = 8, **changed: Any) -> dict[str, Any]:
    """A part in which all went well."""
    good = {
        "part": part,
        "status": 0,
        "seconds": 90.0,
        "after": None,
        "ranks": ranks(devices),
        "devices": devices,
        "batch_size": 32,
        "planned_bytes": 36 * 2**30,
        "measured_bytes": 35 * 2**30,
        "from_steps": [0],
        "loss": 11.78,
        "steps": [1, 2, 3],
        "tokens_per_second": 400_000.0,
        "checkpoints": [3],
        "network": None,
        "failure": [],
    }
    return good | changed


ONE = result("one-gpu", devices=1)
STOPPED = ["rank 0 on n0: error: rank 0 lost contact", "the others waited for rank 7 on n0: hung or killed"]


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (result("one-node"), []),
        (result("one-node", ranks=ranks(8, process=1)), ["1 processes for 8 devices"]),
        (result("one-node", ranks=ranks(8, device_id="GPU-0")), ["1 of 8 devices are used"]),
        (result("one-node", loss=11.79), ["loss of step 1 is 11.7900, on one GPU 11.7800"]),
        (result("stage-1", loss=11.79, batch_size=512), []),
        (result("one-node", measured_bytes=40 * 2**30), ["more memory than planned"]),
        (result("one-node", status=134, failure=["rank 3: x"]), ["ended with status 134: rank 3: x"]),
        (result("signal", status=75), []),
        (result("signal", status=75, checkpoints=[2]), ["the last step is not saved"]),
        (result("signal", status=75, steps=[], loss=None), ["no step was trained"]),
        (result("signal", status=0), ["ended with status 0: see the logs"]),
        (result("resume", devices=1, from_steps=[0, 2]), []),
        (result("resume", devices=1, from_steps=[0, 0]), ["attempts begin at steps [0, 0]"]),
        (result("requeue", from_steps=[0, 2], steps=[1, 3]), ["attempts begin at steps [0, 2]"]),
        (result("stop", status=134, failure=STOPPED), []),
        (result("stop", status=134, failure=STOPPED[:1]), ["the stopped rank is not named"]),
        (result("stop", status=0), ["the stopped rank is not named"]),
    ],
)
def test_a_part_checks_itself(found: dict[str, Any], failed: list[str]) -> None:
    assert failed_checks(found, ONE) == failed


def test_results_are_a_table_for_a_report(tmp_path: Path) -> None:
    found = [ONE | {"failed_checks": []}, result("stop", after=70.0) | {"failed_checks": ["a", "b"]}]
    for each in found:
        write_json(tmp_path / "results" / f"{each['part']}.json", each)
    devices, _, *lines = table(tmp_path).splitlines()
    assert devices == "Devices: NVIDIA H200."
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(COLUMNS) and {len(line) for line in cells} == {len(COLUMNS)}
    assert {row[0]: row[-1] for row in cells[2:]} == {"one-gpu": "passed", "stop": "a; b"}
    assert cells[2][COLUMNS.index("tokens/s of a device")] == "400,000"
    assert cells[3][COLUMNS.index("tokens/s of a device")] == "50,000"


def test_the_network_is_read_from_what_nccl_says() -> None:
    said = "n1:7:9 [0] NCCL INFO NET/Plugin: Could not find\nn1:7:9 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\n"
    assert NETWORK.findall(said) == ["NET/IB"]
