"""Render the chat template on standard input for short conversations, in a process that may use little time and memory.

Whether the template accepts a conversation does not matter here, only that it comes to an end.
"""

import resource
import sys

from jinja2 import TemplateError

from components.dataset.chat import PROBE_BYTES, PROBE_CPU_S

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
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + PROBE_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_DATA, (2 * PROBE_BYTES, 2 * PROBE_BYTES))
    for conversation in CONVERSATIONS:
        for generate in (True, False):
            try:
                render_jinja_template([conversation], chat_template=template, add_generation_prompt=generate)
            except (TemplateError, KeyError, TypeError, ValueError, AttributeError, IndexError):
                continue


if __name__ == "__main__":
    main()
