"""Chat with a model that has a chat template; the embedded demo model has none.

python examples/chat.py STORE [QUESTION]
"""

import sys

import elmoe
from elmoe.errors import RequestError

store = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "What is gravity?"
messages = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": question}]

with elmoe.load(store) as model:
    try:
        stream = model.stream_chat(messages, temperature=0.7, seed=1, max_tokens=64)
    except RequestError as error:
        print(f"{error}.")
        print("Convert a chat model and give its store: elmoe convert Qwen3-30B-A3B my-store")
        sys.exit()
    answer = ""
    for piece in stream:
        print(piece.text, end="", flush=True)
        answer += piece.text
    print()

    # The next turn: the whole conversation is the prompt.
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    print(model.chat(messages, temperature=0.7, seed=1, max_tokens=64).text)
