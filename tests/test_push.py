"""An export goes to a hub: the hub's own client, against an endpoint of the test's."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from llm import push
from llm.cli import main
from llm.common.exported import weights_sha256

from .exported import append, write_export

CARD = {
    "run": "values",
    "step": 40,
    "tokens_seen": 40_000,
    "parameters": 12_345,
    "seed": 1,
    "store_fingerprint": "f1" * 20,
    "context": 64,
    "dtype": "float32",
    "git_commit": "c0ffee",
}


class Hub(BaseHTTPRequestHandler):
    """What a client asks to make a repository and a commit; every file is a regular one."""

    asked: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.strip("/").split("/")
        if kind[1:3] == ["repos", "create"]:
            self.asked["created"] = json.loads(body) | {"token": self.headers["Authorization"]}
            answer: Any = {"url": "https://huggingface.co/me/x", "name": "me/x"}
        elif "preupload" in kind:
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        elif "commit" in kind:
            lines = [json.loads(line) for line in body.splitlines()]
            self.asked["files"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.asked["to"] = self.path
            answer = {"commitUrl": "https://huggingface.co/me/x/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        else:
            answer = {"errors": [], "warnings": []}  # of the card's YAML
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """What was asked of the hub."""
    asked: dict[str, Any] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(push, "HfApi", lambda: HfApi(endpoint=endpoint, token="hf_made_up"))
    yield asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = write_export(tmp_path / "values", CARD, stream=["values"])
    sha256 = weights_sha256(folder)
    (folder / "hippoformer.json").write_text(json.dumps(CARD | {"weights_sha256": sha256}))
    (folder / "evals/samples").mkdir(parents=True)
    (folder / "evals/samples/piqa-0shot.jsonl").write_text("{}\n")
    tasks = [
        {"task": "piqa", "shots": 0, "n": 400, "acc": 0.5, "acc_norm": 0.55, "weights": sha256},
        {"task": "piqa", "shots": 1, "n": 400, "acc": 0.9, "weights": "of others"},
    ]
    losses = [{"split": "validation", "store_fingerprint": "f1" * 20, "n": 1000, "loss": 2.5, "weights_sha256": sha256}]
    (folder / "evals/lm_eval.json").write_text(json.dumps(tasks))
    (folder / "evals/losses.json").write_text(json.dumps(losses))
    return folder


def test_the_folder_goes_up_with_a_card(hub: dict[str, Any], export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(export), "me/x", "--license", "apache-2.0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/x/commit/abc"
    assert hub["created"]["visibility"] == "private" and hub["created"]["token"] == "Bearer hf_made_up"
    assert hub["to"].startswith("/api/models/me/x/commit/main")
    expected = {str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()}
    left_out = {"evals/samples/piqa-0shot.jsonl", *(name for name in expected if name.startswith("."))}
    assert hub["files"].keys() == expected - left_out
    assert all(hub["files"][name] == (export / name).read_bytes() for name in hub["files"])
    card = ModelCard.load(export / "README.md")  # as the hub reads it
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0", "transformers", "text-generation",
    )  # fmt: skip
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert found == {
        ("piqa, 0-shot, 400 items", "acc_norm"): 0.55,
        ("validation of f1f1f1f1f1f1, 1,000 documents", "loss"): 2.5,
    }
    for words in (
        '`stream: ["values"]`',
        "12,345 parameters",
        "seed 1",
        'from_pretrained("me/x", trust_remote_code=True)',
    ):
        assert words in card.text


def test_a_card_of_someone_else_is_kept_and_ours_is_made_again(hub: dict[str, Any], export: Path) -> None:
    assert main(["push", str(export), "me/x", "--public"]) == 0 and hub["created"]["visibility"] == "public"
    assert main(["push", str(export), "me/y"]) == 0
    assert b'from_pretrained("me/y"' in hub["files"]["README.md"]
    (export / "README.md").write_text("# Mine\n")
    assert main(["push", str(export), "me/y"]) == 0 and hub["files"]["README.md"] == b"# Mine\n"


def test_what_cannot_go_up(
    hub: dict[str, Any], export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [(export, "x", "give OWNER/NAME"), (tmp_path, "me/x", "is not an exported folder")]
    for folder, name, words in cases:
        assert main(["push", str(folder), name]) == 2 and words in capsys.readouterr().err
    append(export / "model.safetensors", "x")
    assert main(["push", str(export), "me/x"]) == 2
    assert "are not those that were exported" in capsys.readouterr().err and hub == {}


def test_a_hub_that_cannot_be_reached(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_made_up"))
    assert main(["push", str(export), "me/x"]) == 2
    assert "the hub did not take" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(export), "me/x"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
