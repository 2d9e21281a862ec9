"""The control tokens of the DeepSeek-V4 prompt format, by their exact text.

`｜` is U+FF5C and `▁` is U+2581. Ids differ between models, so they are always read from the
tokenizer file.
"""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# Everything the prompt renderer may write as a token. A tokenizer that lacks one of them cannot
# encode a prompt that uses it; spelling it out in plain text would be silently wrong.
PROMPT_TOKENS = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    *TASKS.values(),
)
