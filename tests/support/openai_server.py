"""A server of OpenAI's protocol as a process: `python -m support.openai_server MODEL_FOLDER PORT NAME`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.gateway import Gateway


def main(folder: str, port: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        found = settings.load({"home": home}, environ={}, directory=Path(home))
        with Workspace(found) as workspace, Gateway(workspace) as gateway:
            workspace.tracking.register_model("served", Path(folder))
            deployed = name.replace("@", "-")
            gateway.deploy(deployed, "served@1", settings=EngineConfig(threads=1, kv_cache_bytes=2_000_000))
            gateway.wait_ready(deployed)
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", lifespan="off")


if __name__ == "__main__":
    main(*sys.argv[1:])
