"""Latency of examples/serving.py under load, stock against fused, and what becomes of requests when something fails.

`python -m benchmarks.serve --model PATH` measures; with `--faults N` it sends N requests and kills a worker in the
middle, floods, poisons and shuts down, and exits 1 where a request is lost or its answer wrong. Takes "ray[serve]".

Requests arrive at random (Poisson) at rates that are shares of what the fused service can do, whether or not those
before them are answered; stock and fused take turns at the same arrivals. Client and service share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import ray
import torch
from ray import serve
from sentence_transformers import SentenceTransformer

from examples import serving
from fastbert import numerics
from fastbert.measure.cases import SEED, Workload, draw

PORT = 8765
TRIES, PAUSE = 600, 0.1
"""Of a client that must not lose a request: so often, so many seconds apart."""


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float
    body: Any
    worker: str
    tries: int


async def ask(session: aiohttp.ClientSession, route: str, text: object, tries: int = 1) -> Answer:
    """A request; while it is answered by 5xx or not at all, again: an embedding asked for twice is the same."""
    begun = time.perf_counter()
    for number in range(1, tries + 1):
        try:
            async with session.post(f"http://127.0.0.1:{PORT}/{route}", json={"text": text}) as response:
                body: Any = await (response.json() if response.content_type == "application/json" else response.text())
                status, worker = response.status, response.headers.get("x-worker", "")
        except (aiohttp.ClientError, OSError) as error:
            status, worker, body = 599, "", repr(error)
        if status < 500 or number == tries:
            break
        await asyncio.sleep(PAUSE)
    return Answer(status, time.perf_counter() - begun, body, worker, number)


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300), read_bufsize=2**18
    )


def texts_of(model: SentenceTransformer, item: Workload) -> list[str]:
    """Texts of so many tokens, two of which are special: of words that are one token each."""
    words = sorted(word for word in model.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    chance = random.Random(SEED)
    return [" ".join(chance.choices(words, k=max(1, n - 2))) for n in item.lengths]


async def at_once(route: str, texts: Sequence[object], most: int, tries: int = 1) -> list[Answer]:
    """All texts, `most` under way at a time."""
    free = asyncio.Semaphore(most)
    async with session() as client:

        async def one(text: object) -> Answer:
            async with free:
                return await ask(client, route, text, tries)

        return await asyncio.gather(*map(one, texts))


async def at_rate(route: str, texts: Sequence[str], rate: float, seconds: float) -> list[Answer]:
    """Texts by chance, arriving at `rate` a second."""
    chance = random.Random(SEED)
    under_way = []
    async with session() as client:
        begun, due = time.perf_counter(), 0.0
        while (due := due + chance.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            under_way.append(asyncio.create_task(ask(client, route, chance.choice(texts))))
        return list(await asyncio.gather(*under_way))


def line(route: str, rate: float, found: list[Answer]) -> str:
    good = sorted(answer.seconds for answer in found if answer.status == 200)
    others = Counter(answer.status for answer in found if answer.status != 200)
    p50, p99 = (1000 * statistics.quantiles(good, n=100, method="inclusive")[i - 1] for i in (50, 99))
    return f"{route:<8}{rate:>10.1f}{len(found):>10}{p50:>10.1f}{p99:>10.1f}   {dict(others) or ''}"


async def measure(texts: list[str], shares: list[float], seconds: float, turns: int) -> None:
    capacity = {}
    for route in ("stock", "fused"):
        await at_once(route, texts[:64], 64)
        begun = time.perf_counter()
        answers = await at_once(route, texts, 2 * serving.BATCH)
        capacity[route] = len(answers) / (time.perf_counter() - begun)
        print(f"{route}: {capacity[route]:.1f} requests/s with {2 * serving.BATCH} under way", flush=True)
    print(f"{'':<8}{'rate':>10}{'requests':>10}{'p50, ms':>10}{'p99, ms':>10}   others, by status")
    for share in shares:
        rate = share * capacity["fused"]
        found: dict[str, list[Answer]] = {"stock": [], "fused": []}
        for _ in range(turns):
            for route, answers in found.items():
                answers += await at_rate(route, texts, rate, seconds)
        for route, answers in found.items():
            print(line(route, rate, answers), flush=True)


class Wrong(Exception):
    """What must not be."""


def check(texts: Sequence[str], answers: Sequence[Answer], stock: SentenceTransformer) -> None:
    """Raises Wrong where one of the texts has another answer than its embedding, by the numerical policy."""
    lost = Counter(answer.status for answer in answers if answer.status != 200)
    if lost:
        raise Wrong(f"lost, by status: {dict(lost)}")
    known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    expected = torch.from_numpy(stock.encode(list(known)))
    exact = torch.from_numpy(stock.double().encode(list(known)))
    stock.float()
    where = [known[text] for text in texts]
    found = torch.tensor([answer.body for answer in answers])
    numerics.assert_within_policy(found, expected[where], exact[where], "answers")


async def killed(texts: list[str], stock: SentenceTransformer) -> str:
    """All texts, four fifths of them beside the others, and a worker killed when the others are answered."""
    others = texts[: len(texts) // 5]
    first = await at_once("fused", texts[:1], 1)
    begun = time.perf_counter()
    most = asyncio.create_task(at_once("fused", texts[len(others) :], 2 * serving.BATCH, TRIES))
    answers = await at_once("fused", others, serving.BATCH, TRIES)
    os.kill(int(first[0].worker), signal.SIGKILL)
    at, answers = len(answers), [*answers, *await most]
    check(texts, answers, stock)
    again = [answer.tries for answer in answers if answer.tries > 1]
    workers = {answer.worker for answer in answers}
    return (
        f"{len(answers)} requests, a worker killed after {at} of one client; none lost or wrong, {len(again)} asked "
        f"again up to {max(again, default=1)} times, {len(workers)} workers, {time.perf_counter() - begun:.0f} s"
    )


async def flooded(texts: list[str], stock: SentenceTransformer) -> str:
    """More at once than are taken and queued: those beyond are refused at once."""
    many = (texts * 4)[: 8 * serving.QUEUED]
    answers = await at_once("fused", many, len(many))
    status = Counter(answer.status for answer in answers)
    if set(status) != {200, 503}:
        raise Wrong(f"statuses {dict(status)}; expected 200 and 503")
    good = [i for i, answer in enumerate(answers) if answer.status == 200]
    check([many[i] for i in good], [answers[i] for i in good], stock)
    check(texts[:8], await at_once("fused", texts[:8], 8), stock)
    slowest = max(answers[i].seconds for i in good)
    return (
        f"of {len(many)} at once {status[200]} were answered, the last after {slowest:.1f} s, and {status[503]} got 503"
    )


async def poisoned(texts: list[str], stock: SentenceTransformer) -> str:
    """A text that the tokenizer refuses, one that is none, one that is too long: each among others."""
    bad: dict[int, tuple[object, int]] = {7: ("\ud800", 422), 23: (3, 400), 41: ("x" * (serving.LONGEST + 1), 413)}
    mixed: list[object] = list(texts[:64])
    for i, (text, _) in bad.items():
        mixed[i] = text
    answers = await at_once("fused", mixed, 64)
    found = {i: answers[i].status for i in bad}
    if found != {i: status for i, (_, status) in bad.items()}:
        raise Wrong(f"bad texts got {found}")
    good = [i for i in range(64) if i not in bad]
    check([texts[i] for i in good], [answers[i] for i in good], stock)
    return f"{len(good)} requests beside {len(bad)} bad ones were answered; those got {sorted(found.values())}"


async def drained(texts: list[str], stock: SentenceTransformer) -> str:
    """Shut down while workers have all requests: those are answered. What comes later gets 404."""
    some = texts[: 2 * serving.BATCH]
    async with session() as client:
        running = [asyncio.create_task(ask(client, "fused", text)) for text in some]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        before = sum(each.done() for each in running)
        await asyncio.to_thread(serve.delete, "fused")
        answers = await asyncio.gather(*running)
    taken = [i for i, answer in enumerate(answers) if answer.status != 404]
    check([some[i] for i in taken], [answers[i] for i in taken], stock)
    if len(taken) <= before:
        raise Wrong("no request was under way at the end")
    after = await at_once("fused", some[:1], 1)
    if after[0].status != 404:
        raise Wrong(f"a request after the end got {after[0].status}")
    return f"{len(taken) - before} requests under way at the end were answered, and one after it got 404"


FAULTS: tuple[Callable[[list[str], SentenceTransformer], Awaitable[str]], ...] = (poisoned, flooded, killed, drained)


def deploy(model: str, routes: Sequence[str], replicas: int, cpus: int) -> None:
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    serve.start(http_options={"port": PORT})
    for route in routes:
        arguments = {"model": model, "fused": str(int(route == "fused")), "replicas": str(replicas), "cpus": str(cpus)}
        serve.run(serving.app(arguments), name=route, route_prefix=f"/{route}")


def faults(model: str, requests: int, replicas: int = 2, cpus: int = 1) -> list[str]:
    """What is told of each of FAULTS. Raises Wrong."""
    deploy(model, ["fused"], replicas, cpus)
    stock = SentenceTransformer(model, device="cpu")
    texts = texts_of(stock, Workload("", draw(("squad_questions", 500))))
    told = []
    for fault in FAULTS:
        count = requests if fault is killed else len(texts)
        some = (texts * (count // len(texts) + 1))[:count]
        told.append(f"{fault.__name__}: {asyncio.run(fault(some, stock))}")
        print(told[-1], flush=True)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="of sentence-transformers: a folder, or a name on the hub")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=20, help="of one turn at a rate")
    parser.add_argument("--turns", type=int, default=2, help="of stock and fused at a rate")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="threads of a replica on a CPU")
    parser.add_argument("--faults", type=int, metavar="N", help="not latency: N requests with faults")
    given = parser.parse_args()
    try:
        if given.faults is not None:
            faults(given.model, given.faults)
        else:
            deploy(given.model, ["stock", "fused"], given.replicas, given.cpus)
            stock = SentenceTransformer(given.model, device="cpu")
            texts = texts_of(stock, Workload("", draw(("squad_questions", 384), ("squad_passages", 128))))
            asyncio.run(measure(texts, given.rates, given.seconds, given.turns))
    except Wrong as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
