"""Joining a Ray cluster, and refusing one that anybody may join: whoever does can run code on all of its nodes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import grpc
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, as is the next
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from megatron_mmrl.config import ConfigError

_PROBE_S = 10.0


def connect(address: str, *, allow_open: bool) -> None:
    """Join the cluster at ``address`` ("auto": that of RAY_ADDRESS or of this machine) as a driver.

    Raises:
        ConfigError: there is none, it has another token, or it lets anyone in and ``allow_open`` is not set.
    """
    try:
        found = canonicalize_bootstrap_address_or_die(address)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster found ({error}); start one, or name it with --address") from error
    check_access(found, allow_open=allow_open)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of what Ray's next version changes
            context = ray.init(address=found, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"the Ray cluster at {found} does not take this machine in: {error}") from error
    dashboard = context.dashboard_url or ""
    if dashboard and not dashboard.startswith(("127.", "localhost")):
        print(f"warning: Ray's dashboard listens on {dashboard}, not on loopback alone", file=sys.stderr)


def check_access(address: str, *, allow_open: bool) -> None:
    """Ask the cluster without a token, then with ours.

    Raises:
        ConfigError: see ``connect``.
    """
    if _answers(address, ()):
        if not allow_open:
            raise ConfigError(
                f"the Ray cluster at {address} asks for no token: whoever reaches it can run code on all of its nodes; "
                "start Ray with RAY_AUTH_MODE=token on every node (docs/ray.md), or use --allow-open-cluster"
            )
        return
    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE") != "token" or not loader.has_token():
        raise ConfigError(
            f"the Ray cluster at {address} asks for a token; set RAY_AUTH_MODE=token here and RAY_AUTH_TOKEN_PATH to "
            "the file that holds it (by default ~/.ray/auth_token)"
        )
    header = loader.get_token_for_http_header()
    if not _answers(address, tuple((name.lower(), value) for name, value in header.items())):
        raise ConfigError(f"the Ray cluster at {address} refuses our token; use the one that it was started with")


def _answers(address: str, metadata: Sequence[tuple[str, str]]) -> bool:
    """Whether the cluster talks to who shows this, or wants another token. Raises ConfigError if none is there."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_PROBE_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ConfigError(f"no Ray cluster answers at {address}: {error.details()}") from error
    return True
