"""A model's prompts and responses as text."""

from typing import Any

from flexalign.data.rendering import Opening, Prompt, Rendering
from flexalign.data.thinking import ThinkingTags
from flexalign.evaluation.systems.backend import Messages


class ModelText:
    """How one model's prompts are written and its responses read."""

    def __init__(self, tokenizer: Any, tags: ThinkingTags | None = None) -> None:
        """Read with a tokenizer; the thinking tags are its own if not given."""
        self.tokenizer = tokenizer
        self.tags = tags or ThinkingTags.of(tokenizer)

    def prompt(self, messages: Messages) -> Prompt:
        """The prompt as :func:`generate_responses` takes it; text where there is no template."""
        if isinstance(messages, str) or self.tokenizer.chat_template:
            return messages
        return "\n\n".join(message["content"] for message in messages)

    def render(self, messages: Messages) -> str:
        """The prompt as text."""
        return Rendering(self.tokenizer, self.tags).prompt(self.prompt(messages)).text

    def length(self, messages: Messages) -> int:
        """The prompt's length in tokens, special tokens that a tokenizer adds left out."""
        return len(self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"])

    def whole(self, messages: Messages, response: str) -> str:
        """A response with its opening tag, which may stand in the prompt."""
        prompt = Rendering(self.tokenizer, self.tags).prompt(self.prompt(messages))
        return self.tags.open + response if prompt.opening is Opening.OPENED else response

    def thinking_tokens(self, response: str) -> int:
        """Tokens between the thinking tags."""
        return self.tags.count_tokens(response, self.tokenizer)
