"""The control `--reward likelihood`: the score of a story is the likelihood under the frozen
student. If likelier stories are better stories, the student learns as much as from a teacher."""

from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.data.batches import by_length
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.generate import encode_opening, generate
from tinystory.student.model import Student
from tinystory.teacher.grade import LocalGrader, Submission

# Mean and standard deviation of the scores of the student's own stories, about as from a teacher.
MEAN = 0.5
SPREAD = 0.2
STORIES = 64  # the student's own stories that set the scale

Text = tuple[list[int], list[int]]  # token ids of an opening and of its story


class Likelihood(LocalGrader):
    """A grader with scores that are a linear function of the mean log-probability of a story's
    tokens, clipped to 0..1. The end token counts if the story has one."""

    def __init__(
        self,
        student: Student,
        tokenizer: Tokenizer,
        openings: Sequence[str],
        config: InteractConfig,
    ):
        super().__init__({"scored_by": "likelihood"})
        self.student = student
        self.tokenizer = tokenizer
        self.batch_size = config.micro_batch_size
        prompts = [openings[i % len(openings)] for i in range(STORIES)]
        stories = generate(
            student,
            None,
            tokenizer,
            prompts,
            first_index=0,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        texts = [(story.prompt_ids.tolist(), story.tokens.tolist()) for story in stories]
        means = self.mean_logprobs(texts)
        self.mean = fmean(means)
        self.spread = max(pstdev(means), 1e-6)

    def scores(self, submissions: Sequence[Submission]) -> list[float]:
        texts: list[Text] = []
        for submission in submissions:
            # The student's tokens are used if known, because several sequences of tokens decode to
            # the same text.
            story = list(submission.tokens) or self.tokenizer.encode(f" {submission.story}")
            texts.append((encode_opening(self.tokenizer, submission.opening), story))
        scores: list[float] = []
        for mean in self.mean_logprobs(texts):
            score = MEAN + SPREAD * (mean - self.mean) / self.spread
            scores.append(min(max(score, 0.0), 1.0))
        return scores

    @torch.no_grad()
    def mean_logprobs(self, texts: Sequence[Text]) -> list[float]:
        """Mean log-probability of the story's tokens of each text, in nats per token. A text can be
        longer than the context if it is not by the student; then only the last tokens are used."""
        weight = self.student.unembedding
        rows = []
        starts = []  # position of the story's first token in each row
        for opening, story in texts:
            row = (opening + story)[-self.student.config.context :]
            rows.append(torch.tensor(row, device=weight.device))
            starts.append(max(len(row) - len(story), 1))  # no token precedes a row's first one
        means = [0.0] * len(texts)
        for group in by_length(np.array([len(row) for row in rows]), self.batch_size):
            tokens = pad_sequence([rows[i] for i in group], batch_first=True)
            hidden = self.student.hidden(tokens)  # padding comes last, so no token attends to it
            for i, row_hidden in zip(group, hidden, strict=True):
                start = starts[i]
                predicting = row_hidden[start - 1 : len(rows[i]) - 1]
                logprobs, _ = ops.token_logprob(predicting, weight, rows[i][start:])
                means[i] = float(logprobs.double().mean())
        return means
