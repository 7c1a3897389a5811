import contextlib
import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch_fidelity.feature_extractor_inceptionv3

from cxr_vae.errors import UserError
from cxr_vae.evaluation import inception_weights
from cxr_vae.evaluation.inception_weights import cache_path, fetch_weights, find_weights
from tests.helpers import check_sentence, cxr_vae

CONTENT = b"stands for the real file, which no test machine can download" * 100


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTENT counts as the right file."""
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(inception_weights, "NUM_BYTES", len(CONTENT))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A web server of our own in the place of GitHub; files put into the folder can be downloaded."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(inception_weights, "URL", f"http://127.0.0.1:{httpd.server_port}/weights.pth")
    yield folder
    httpd.shutdown()


def test_constants_are_torch_fidelitys_and_the_issues() -> None:
    assert torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3 == inception_weights.URL
    assert inception_weights.SHA256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert inception_weights.NUM_BYTES == 95_628_359
    assert inception_weights.SHA256.startswith(inception_weights.NAME.rpartition("-")[2].removesuffix(".pth"))


def test_torch_fidelity_looks_where_we_put_them(cache: Path) -> None:
    assert cache_path() == cache / inception_weights.NAME


def test_a_file_with_the_right_hash_is_taken(tmp_path: Path, expected: None) -> None:
    (tmp_path / "download.pth").write_bytes(CONTENT)
    path = fetch_weights(tmp_path / "download.pth")
    assert path == find_weights()
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o044 == 0o044  # others who share the cache can read it
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize("content", [b"", CONTENT + b"x", CONTENT[:-1] + b"!"])
def test_any_other_file_is_refused_and_the_cache_stays_empty(tmp_path: Path, expected: None, content: bytes) -> None:
    (tmp_path / "wrong.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.pth is not the Inception file"):
        fetch_weights(tmp_path / "wrong.pth")
    assert list(cache_path().parent.iterdir()) == []
    assert find_weights() is None


def test_downloading(server: Path, expected: None) -> None:
    (server / "weights.pth").write_bytes(CONTENT)
    assert fetch_weights().read_bytes() == CONTENT


def test_a_download_that_was_cut_or_exchanged_is_refused(server: Path, expected: None) -> None:
    (server / "weights.pth").write_bytes(CONTENT[: len(CONTENT) // 2])
    with pytest.raises(UserError, match="is not the Inception file: it has"):
        fetch_weights()
    assert find_weights() is None


def test_a_failed_download_says_what_else_can_be_done(server: Path) -> None:
    with pytest.raises(UserError, match=r"can't be downloaded .*fetch-weights --from FILE"):
        fetch_weights()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"hello\r\n\r\n", "hello"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nabc", "IncompleteRead"),
        (None, "came in 1 s"),
    ],
)
def test_a_strange_server_is_a_failed_download(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(4096)
        if answer is not None:
            connection.sendall(answer)
        else:  # never silent for long, never at an end
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(600):
                    connection.sendall(b"x")
                    time.sleep(0.1)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(inception_weights, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")
        threading.Thread(target=lambda: serve(server.accept()[0]), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"can't be downloaded \(.*{reason}"):
            fetch_weights(timeout_s=60, within_s=1)
        assert time.monotonic() - began < 30
    assert list(cache_path().parent.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_not_used(expected: None) -> None:
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match="delete it"):
        find_weights()


def test_the_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "wrong.pth").write_bytes(b"x")
    for source, words in ((tmp_path / "wrong.pth", "it has 1 bytes"), (tmp_path / "none.pth", "no such file")):
        check_sentence(cxr_vae("fetch-weights", "--from", source, TORCH_HOME=str(tmp_path)), words)
