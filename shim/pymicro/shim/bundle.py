"""A bundle: the directory that containerd prepares for a container, and what the shim takes from its config.json."""

import json
import os
from typing import Any

from msgspec import Struct
from pymicro.shim.errors import InvalidRequest


class Bundle(Struct, frozen=True):
    """One container's bundle. `spec` is the decoded config.json."""

    path: str
    spec: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> "Bundle":
        """Read a bundle. Raises InvalidRequest when config.json is missing or no JSON object."""
        config = os.path.join(path, "config.json")
        try:
            with open(config, encoding="utf-8") as file:
                spec = json.load(file)
        except OSError as error:
            raise InvalidRequest(f"cannot read {config}: {error.strerror}") from error
        except ValueError as error:
            raise InvalidRequest(f"{config} is not JSON: {error}") from error
        if not isinstance(spec, dict):
            raise InvalidRequest(f"{config} holds no JSON object")
        return cls(path, spec)

    @property
    def annotations(self) -> dict[str, str]:
        return self.spec.get("annotations") or {}

    @property
    def cgroups_path(self) -> str:
        return str((self.spec.get("linux") or {}).get("cgroupsPath") or "")

    @property
    def resources(self) -> dict[str, Any]:
        return (self.spec.get("linux") or {}).get("resources") or {}

    @property
    def oom_score_adj(self) -> int | None:
        """How willingly the kernel ends it when memory runs out, None for as willingly as the shim."""
        score = (self.spec.get("process") or {}).get("oomScoreAdj")
        return score if isinstance(score, int) else None

    @property
    def netns_path(self) -> str:
        """The network namespace that the spec names, "" for a new one."""
        namespaces = (self.spec.get("linux") or {}).get("namespaces") or []
        return next((str(ns.get("path") or "") for ns in namespaces if ns.get("type") == "network"), "")
