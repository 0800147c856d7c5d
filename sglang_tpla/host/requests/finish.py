"""The end of an answer that lies inside of what one step of a speculating server verified.

SGLang looks for an end once a step, over all tokens that the step kept, and so takes one that comes later: up to 0.5.17
the full length before a stop token ahead of it, and always a stop string before a stop token ahead of it, and the stop
string that the request names first. The answer would then go on behind its end, by tokens that it has nowhere else.
"""

from collections.abc import Callable
from typing import Any


def after_each_token(original: Callable[..., None], self: Any, new_accepted_len: int = 1) -> None:
    """Hook around ``Req.update_finish_state``: look for an end after each token, as where a step says one."""
    rest = self.output_ids[len(self.output_ids) - new_accepted_len + 1 :]
    if new_accepted_len < 2 or self.to_finish or self.finished():
        original(self, new_accepted_len)
        return
    del self.output_ids[-len(rest) :]
    grammar, self.grammar = self.grammar, None  # it has taken all tokens, and ends with the last one
    try:
        original(self)
        while rest:
            if self.finished():
                if self.finished_len is None:
                    self.finished_len = len(self.output_ids)
                return
            self.output_ids.append(rest.pop(0))
            if not rest:
                self.grammar = grammar
            original(self)
    finally:
        self.output_ids.extend(rest)
        self.grammar = grammar
