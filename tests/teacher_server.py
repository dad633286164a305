"""A server that scores, for tests: an engine of this process in the forms of vLLM and SGLang."""

import base64
import contextlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, ScoringSettings
from opd_stream.types import RolloutBatch

Fault = Callable[[int], str | None]  # number of a request -> what goes wrong with it
FAULTS = ("429", "500", "503", "reset", "broken", "short", "cut", "other_ids")
NAME = "the-teacher"


class TeacherServer:
    """Answers like a server; what it was asked for and what went wrong is counted."""

    def __init__(
        self,
        engine: Engine,
        vocabulary: int,
        *,
        fault: Fault = lambda number: None,
        most_logprobs: int = 1 << 30,
        key: str | None = None,
        noise: float = 0.0,
    ) -> None:
        self.engine, self.vocabulary, self.fault = engine, vocabulary, fault
        self.most_logprobs, self.key, self.noise = most_logprobs, key, noise
        self.requests, self.faults = 0, Counter[str]()
        self.scored = Counter[tuple[int, ...]]()  # texts that were answered whole
        self.questions = list[dict[str, Any]]()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "TeacherServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def dense(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities [L - 1, V] of what follows each token but the last."""
        text = RolloutBatch(
            prompt_id=("text",),
            sample_index=np.zeros(1, np.int32),
            prompt_ids=(np.array(ids[:1], np.int32),),
            completion_ids=(np.array(ids[1:], np.int32),),
            behavior_logprobs=(np.zeros(len(ids) - 1, np.float32),),
            finish_reason=("length",),
        )
        with self.lock:
            found = self.engine.score(text, ScoringSettings(top_k=self.vocabulary))
            jitter = np.random.default_rng(self.requests).normal(0, 1, len(ids) - 1)
        dense_TV = np.empty((len(ids) - 1, self.vocabulary), np.float32)
        top_ids = found.teacher_top_ids[0].astype(np.int64)
        np.put_along_axis(dense_TV, top_ids, found.teacher_top_logprobs[0], axis=1)
        return dense_TV + (self.noise * jitter[:, None]).astype(np.float32)


@contextlib.contextmanager
def fake_teacher(folder: Path, **options: Any) -> Iterator[TeacherServer]:
    """A server of engine fake with the weights of a folder."""
    engine = open_engine(engine="fake", folder=folder, dtype="float32", batch_rows=8)
    with TeacherServer(engine, 97, **options) as server:
        yield server


def seeded_faults(seed: int, share: float, *, most: int = 1 << 30) -> Fault:
    """A fault in a share of the requests, `most` in all."""
    random, left = np.random.default_rng(seed), [most]

    def fault(number: int) -> str | None:
        if left[0] and random.random() < share:
            left[0] -= 1
            return str(random.choice(FAULTS))
        return None

    return fault


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _handler(server: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": NAME}]}).encode())

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests += 1
                fault = server.fault(server.requests)
                server.questions.append({"path": self.path, **question})
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                said = f"Incorrect API key: {self.headers['Authorization']}"
                self._send(401, json.dumps({"error": {"message": said}}).encode())
                return
            try:
                if fault is None:
                    ids, data = _answer(server, self.path, question)
                    with server.lock:
                        server.scored[tuple(ids)] += 1
                    self._send(200, data)
                else:
                    with server.lock:
                        server.faults[fault] += 1
                    self._fail(fault, question)
            except _Refused as error:
                body = json.dumps({"error": {"message": str(error), "code": error.status}})
                self._send(error.status, body.encode())

        def _fail(self, fault: str, question: dict[str, Any]) -> None:
            if fault.isdigit():
                pause = {"Retry-After": "0"} if fault == "429" else {}
                self._send(int(fault), b'{"error": {"message": "busy"}}', pause)
            elif fault == "reset":
                self.connection.close()
                self.close_connection = True
            elif fault == "silent":
                time.sleep(30)
            elif fault == "broken":
                self._send(200, b'{"choices": [{"prompt_logprobs": [null, {"1": {"logp')
            elif fault == "cut":
                _, data = _answer(server, self.path, question)
                self._send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
                self.close_connection = True
            else:
                name = next(n for n in ("prompt", "token_ids", "input_ids") if n in question)
                ids = list(question[name])
                if fault == "short":
                    ids = ids[:-1] if len(ids) > 2 else [*ids, ids[0]]
                else:
                    ids = [(token + 1) % server.vocabulary for token in ids]
                self._send(200, _answer(server, self.path, {**question, name: ids})[1])

        def _send(self, status: int, data: bytes, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(data)), **(more or {})}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler


def _answer(server: TeacherServer, path: str, question: dict[str, Any]) -> tuple[list[int], bytes]:
    """The ids that were asked about, and the answer's body."""
    if question.get("model", NAME) != NAME:
        raise _Refused(404, f"The model `{question['model']}` does not exist.")
    if path == "/v1/completions":
        ids, top_k = question["prompt"], question["prompt_logprobs"]
        choice = {"index": 0, "text": "x", "prompt_token_ids": ids}
        choice["prompt_logprobs"] = _prompt_logprobs(server, ids, top_k)
        return ids, _json({"object": "text_completion", "choices": [choice]})
    if path == "/inference/v1/generate":
        params, ids = question["sampling_params"], question["token_ids"]
        found = {"prompt_logprobs": _prompt_logprobs(server, ids, params["prompt_logprobs"])}
        given = params.get("prompt_logprob_token_ids")
        if given is not None:
            dense = server.dense(ids)[params["prompt_logprob_start"] :]
            held = io.BytesIO()
            np.save(held, np.take_along_axis(dense, np.array(given), axis=1)[: len(given)])
            encoded = base64.b64encode(held.getvalue()).decode()
            found["prompt_token_id_logprobs"] = encoded
        return ids, _json({**found, "prompt_token_ids": ids})
    if path == "/generate":
        return question["input_ids"], _json({"text": "", "meta_info": _meta(server, question)})
    raise _Refused(404, "Not Found")


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _check_cap(server: TeacherServer, top_k: int) -> None:
    if top_k > server.most_logprobs:
        raise _Refused(
            400,
            f"Requested prompt logprobs of {top_k}, which is greater than max allowed: "
            f"{server.most_logprobs}",
        )


TEXTS = ('":{"logprob":-1,', "\\", "}]", "漢", " the", '"5":{"logprob":-9.5,"rank":1}')


def _prompt_logprobs(server: TeacherServer, ids: list[int], top_k: int) -> list[Any]:
    """As vLLM writes them: the token itself, then the candidates by rank; one that is both once."""
    _check_cap(server, top_k)
    positions: list[Any] = [None]
    for logprobs_V, token in zip(server.dense(ids), ids[1:], strict=True):
        order = np.argsort(-logprobs_V, kind="stable")
        entries: dict[str, Any] = {}
        for rank, number in enumerate([token, *order[:top_k].tolist()]):
            entries[str(number)] = {
                "logprob": max(float(logprobs_V[number]), -9999.0),
                "rank": rank or int(np.flatnonzero(order == token)[0]) + 1,
                "decoded_token": TEXTS[number % len(TEXTS)],
            }
        positions.append(entries)
    return positions


def _meta(server: TeacherServer, question: dict[str, Any]) -> dict[str, Any]:
    """As SGLang writes them: triples of log-probability, id, text; the first position is null."""
    ids, start = question["input_ids"], question["logprob_start_len"]
    top_k, given = question["top_logprobs_num"], question.get("token_ids_logprob")
    dense = server.dense(ids)[start:]

    def triples(logprobs_V: np.ndarray, numbers: Any) -> list[Any]:
        return [[float(logprobs_V[number]), int(number), None] for number in numbers]

    order = np.argsort(-dense, axis=1, kind="stable")[:, :top_k]
    drawn = [triples(*pair)[0] for pair in zip(dense, [[t] for t in ids[start + 1 :]], strict=True)]
    found: dict[str, Any] = {
        "prompt_tokens": len(ids),
        "input_token_logprobs": [[None, ids[start], None], *drawn],
        "input_top_logprobs": [None, *(triples(*pair) for pair in zip(dense, order, strict=True))],
    }
    if given is not None:
        found["input_token_ids_logprobs"] = [None, *(triples(row, given) for row in dense)]
    return found
