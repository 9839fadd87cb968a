"""Embeddings over HTTP on Ray Serve: one fused model on each device, requests of any length batched as they come.

`serve run examples.serving:app model=sentence-transformers/all-MiniLM-L6-v2`, and then POST {"text": "..."} to port
8000: a JSON list of numbers. docs/scaling.md tells what becomes of bad texts, at overload, and when a worker dies.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import numpy as np
import torch
from ray import serve
from sentence_transformers import SentenceTransformer
from starlette.requests import Request
from starlette.responses import JSONResponse

import fastbert

BATCH = 32
QUEUED = 256
"""Requests that wait at the proxy; those beyond get status 503 at once."""
LONGEST = 100_000
"""Characters of a text: to tokenise one of many more would hold up the others."""


class Embedder:
    """Answers texts with embeddings."""

    def __init__(self, model: str, fused: bool = True) -> None:
        loaded = SentenceTransformer(model)
        self.model = fastbert.fuse(loaded) if fused else loaded
        self.model.encode("the first call compiles")

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            text = json.loads(await request.body())["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is a {type(text).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            return self._answer({"error": f'{error}; expected {{"text": "..."}}'}, 400)
        if len(text) > LONGEST:
            return self._answer({"error": f"text has {len(text)} characters; expected at most {LONGEST}"}, 413)
        found = await self.embed(text)
        if isinstance(found, Exception):
            return self._answer({"error": f"{type(found).__name__}: {found}"}, 422)
        return self._answer(found.tolist(), 200)

    def _answer(self, content: object, status: int) -> JSONResponse:
        return JSONResponse(content, status, {"x-worker": str(os.getpid())})

    # No waiting for more: what comes while a batch runs is the next one, and packed it may be of any lengths.
    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0)
    async def embed(self, texts: list[str]) -> list[np.ndarray | Exception]:
        return await asyncio.to_thread(self._embed, texts)  # a thread, so that requests are taken meanwhile

    def _embed(self, texts: list[str]) -> list[np.ndarray | Exception]:
        """An embedding of each text, or what was wrong with it."""
        try:
            found = self.model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        except Exception as error:  # whatever a tokenizer or a device raises is told to the text that it is of
            if len(texts) == 1:
                return [error]
            half = len(texts) // 2
            return self._embed(texts[:half]) + self._embed(texts[half:])
        return [row if np.isfinite(row).all() else ValueError("not finite") for row in found]


def app(arguments: dict[str, str]) -> Any:
    """What `serve run` starts. Arguments: model; fused=0 for stock; replicas; cpus, the threads of each on a CPU."""
    gpus = torch.cuda.device_count()
    cpus = int(arguments.get("cpus", 1))
    deployment = serve.deployment(
        num_replicas=int(arguments.get("replicas", max(gpus, 1))),
        ray_actor_options={"num_gpus": 1} if gpus else {"num_cpus": cpus},
        max_ongoing_requests=2 * BATCH,  # one batch that runs, one that waits for it
        max_queued_requests=QUEUED,
        graceful_shutdown_timeout_s=60,  # what was taken is answered
    )(Embedder)
    return deployment.bind(arguments["model"], arguments.get("fused", "1") != "0")
