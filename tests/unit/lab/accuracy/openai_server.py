"""Answer the tiny MoE's questions from their files, as an OpenAI completions server.

    python openai_server.py PORT TASKS TOKENIZER [wrong PROMPT] [shift NATS]

``wrong`` gives another answer to one prompt, ``shift`` moves the log probability of every token.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Model:
    """Know all answers."""

    def __init__(self, tasks: Path, tokenizer: Path, wrong: str, shift: float):
        vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
        self.signs = {number: sign for sign, number in vocabulary.items()}
        self.answers, self.shift = {}, shift
        for file in tasks.glob("*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                self.answers[line["prompt"]] = (
                    line["answer"] if "answer" in line else line["choices"][line["label"]]
                )
        if wrong:
            self.answers[wrong] = self.answers[wrong][::-1] + "0"

    def choice(self, index: int, ids: list[int], echo: bool) -> dict:
        """Return an answer to one prompt, in the form of the API."""
        text = "".join(self.signs[number] for number in ids)
        if not echo:
            return {"index": index, "text": self.answers[text]}
        prompt = next(p for p in self.answers if text.startswith(p))
        right = (prompt + self.answers[prompt]).ljust(len(text), "\0")
        # One number per token and one more for the token that is generated behind them.
        values = [(-0.01 if a == b else -3.0) + self.shift for a, b in zip(text, right)] + [0.0]
        return {
            "index": index,
            "text": text,
            "logprobs": {
                "token_logprobs": values,
                "top_logprobs": [{"": value} for value in values],
            },
        }


def main() -> None:
    port, tasks, tokenizer, *more = sys.argv[1:]
    options = dict(zip(more[::2], more[1::2]))
    model = Model(
        Path(tasks), Path(tokenizer), options.get("wrong", ""), float(options.get("shift", 0))
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choices = [
                model.choice(i, ids, asked.get("echo", False))
                for i, ids in enumerate(asked["prompt"])
            ]
            body = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    print("moe_placement_plugin: a placement on EP rank 0/2", flush=True)
    HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
