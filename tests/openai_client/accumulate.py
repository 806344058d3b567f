"""What OpenAI's own client makes of streams: run in an environment that has some version of it.

    python accumulate.py URL < names       one name of a stream a line

Asks the server at URL for each stream by its name (as the model) and prints, a JSON line each, what
`ChatCompletionStreamState` has accumulated at the end. Knows nothing of Penstock.
"""

import json
import sys

from openai import NOT_GIVEN, OpenAI
from openai.lib.streaming.chat._completions import ChatCompletionStreamState


def accumulated(client: OpenAI, name: str) -> dict[str, object]:
    """`completion`: the snapshot; `final`: the parsed one, null where the client refuses to make
    it of a completion that was cut off; `events`: the kinds of events that were fired."""
    state = ChatCompletionStreamState(input_tools=NOT_GIVEN, response_format=NOT_GIVEN)
    events: list[str] = []
    messages = [{"role": "user", "content": "hello"}]
    cut_off = False
    for chunk in client.chat.completions.create(model=name, messages=messages, stream=True):
        events += [event.type for event in state.handle_chunk(chunk)]
        cut_off = cut_off or any(choice.finish_reason == "length" for choice in chunk.choices)
    snapshot = state.current_completion_snapshot
    final = None if cut_off else state.get_final_completion().to_dict(mode="json")
    return {"completion": snapshot.to_dict(mode="json"), "final": final, "events": events}


def main() -> None:
    client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    for name in sys.stdin.read().split():
        print(json.dumps(accumulated(client, name)))


if __name__ == "__main__":
    main()
