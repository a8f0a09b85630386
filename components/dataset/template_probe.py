"""Render the chat template on standard input for short conversations, with limits on time and memory.

`python -m components.dataset.template_probe SECONDS BYTES`: CPU time, and memory on top of Python and its libraries.
Whether the template accepts a conversation does not matter here, only that it comes to an end.
"""

import math
import resource
import sys

from jinja2 import TemplateError

CONVERSATIONS = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b" * 2000},
        {"role": "assistant", "content": "c"},
    ],
]


def main() -> None:
    """Exit with 0 when the rendering ended."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = sys.stdin.read()
    seconds, memory = (int(argument) for argument in sys.argv[1:])
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds += math.ceil(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    memory += used.ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    for conversation in CONVERSATIONS:
        for generate in (True, False):
            try:
                render_jinja_template([conversation], chat_template=template, add_generation_prompt=generate)
            except (TemplateError, KeyError, TypeError, ValueError, AttributeError, IndexError):
                continue


if __name__ == "__main__":
    main()
