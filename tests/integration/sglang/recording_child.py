"""Run one `sglang.Engine` that records in a child process; write what it generated.

python -m tests.integration.sglang.recording_child ENGINE_ARGUMENTS_JSON PROMPTS_JSON RESULT
[forked]

Workers are spawned, as SGLang does it, or forked.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.integration.sglang.engine_child import fork_workers


def main() -> None:
    if "forked" in sys.argv[4:]:
        fork_workers()
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[1]))
    outputs = engine.generate(
        input_ids=json.loads(sys.argv[2]),
        sampling_params={"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True},
        return_logprob=True,
    )
    ids = [[token for _, token, *_ in o["meta_info"]["output_token_logprobs"]] for o in outputs]
    Path(sys.argv[3]).write_text(json.dumps(ids))
    # SGLang kills its workers, and idle ones write what they have counted within two looks.
    time.sleep(3)
    engine.shutdown()


if __name__ == "__main__":
    main()
