"""Chat templates that write a date into the prompt, after the published ones' structure."""

_HEAD = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
"""
_REST = """{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA_3_1 = f"""{_HEAD}{{%- if not date_string is defined %}}
    {{%- set date_string = "26 Jul 2024" %}}
{{%- endif %}}
{_REST}"""
LLAMA_3_2 = f"""{_HEAD}{{%- if not date_string is defined %}}
    {{%- if strftime_now is defined %}}
        {{%- set date_string = strftime_now("%d %b %Y") %}}
    {{%- else %}}
        {{%- set date_string = "26 Jul 2024" %}}
    {{%- endif %}}
{{%- endif %}}
{_REST}"""
GPT_OSS = """{{- "<|start|>system<|message|>Knowledge cutoff: 2024-06\\n" }}
{{- "Current date: " + strftime_now("%Y-%m-%d") + "<|end|>" }}
{%- for message in messages %}
{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|return|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{% endif %}
"""
GRANITE = """{%- if strftime_now is not defined %}{{ raise_exception('no clock') }}{% endif %}
{{- "<|start_of_role|>system<|end_of_role|>Today's Date: " + strftime_now( '%B %d, %Y' ) + ".<|end_of_text|>\\n" }}
{%- for message in messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""
DATED = {
    "llama 3.1": (LLAMA_3_1, "%d %b %Y"),
    "llama 3.2": (LLAMA_3_2, "%d %b %Y"),
    "gpt-oss": (GPT_OSS, "%Y-%m-%d"),
    "granite": (GRANITE, "%B %d, %Y"),
}
"""Template, and how it writes the date."""
