"""Chat with a model that has a chat template. The embedded demo model has one, but is too small to know anything.

python examples/chat.py STORE [QUESTION]
"""

import sys

import elmoe

store = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "What do you like to do?"
messages = [{"role": "user", "content": question}]

with elmoe.load(store) as model:
    answer = ""
    for piece in model.stream_chat(messages, temperature=0.7, seed=1, max_tokens=64):
        print(piece.text, end="", flush=True)
        answer += piece.text
    print()

    # The next turn: the whole conversation is the prompt.
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    print(model.chat(messages, temperature=0.7, seed=1, max_tokens=64).text)
