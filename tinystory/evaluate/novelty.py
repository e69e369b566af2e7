"""NoveltyBench's distinct (arXiv 2504.05228): how many answers to one prompt differ, as its classifier sees it."""

import torch

from tinystory.evaluate.reader import loading

THRESHOLD = 0.102  # probability above which two answers are the same, as in its code
MAX_TOKENS, SHORT = 128, 5  # tokens read of each answer; answers of up to so many words are compared by their words


class SameStory:
    """Whether a classifier of pairs, whose class 1 means "the same", says that of two stories. The paper's is
    yimingzhang/deberta-v3-large-generation-similarity, with the tokenizer of microsoft/deberta-v3-large."""

    def __init__(self, model: str, tokenizer: str = ""):
        """Names on the Hub or folders. Raises UserError without transformers, or if it cannot load them."""
        with loading(f"--same-story {model}", "a classifier of the Hub and its tokenizer, or their folders"):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
            self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()

    @torch.inference_mode()
    def __call__(self, first: str, second: str) -> bool:
        words = [text.lower().split() for text in (first, second)]
        if (longest := max(map(len, words))) <= SHORT:
            return 2 * len({*words[0]} & {*words[1]}) >= longest
        ids, types = [self.tokenizer.cls_token_id], [0]
        for segment, text in enumerate((first, second)):
            tokens = self.tokenizer.encode(text, truncation=True, max_length=MAX_TOKENS, add_special_tokens=False)
            ids += [*tokens, self.tokenizer.sep_token_id]
            types += [segment] * (len(tokens) + 1)
        logits = self.model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        return float(logits.softmax(-1)[0, 1]) > THRESHOLD
