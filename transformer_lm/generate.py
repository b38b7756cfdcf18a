"""What does the model write?

    python transformer_lm/generate.py
    python transformer_lm/generate.py --prompt "It was a dark night" --temperature 0.7 --top-p 0.9 --n 3
    python transformer_lm/generate.py --interactive

Each new token is drawn from what the model expects, softmax(logits / temperature): at 1 as it was trained, below 1 the
likelier ones more often, at 0 always the likeliest. `--top-k` draws from the k likeliest alone, `--top-p` from the
fewest of these whose probabilities add up to p. Of a prompt longer than the model's context only the end is seen.

Writes generated.txt, metrics.json (`--interactive` answers on the terminal instead).
Sources: Fan et al. 2018 (top k); Holtzman et al. 2020 (top p).
"""

import argparse
import sys

import torch

from shared_utils.cli import (
    UserError,
    make_parser,
    non_negative_float,
    positive_float,
    positive_int,
    run_main,
    utf8_text,
)
from shared_utils.device import pick_device
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from transformer_lm.checkpoints import add_ckpt_flag, find_checkpoint, load_model
from transformer_lm.model import TransformerLM
from transformer_lm.texts import printable, write_texts
from transformer_lm.tokens import Tokens

PROMPTS = ("The Eiffel Tower is in Paris", "Sherlock Holmes looked at the", "To be or not to")


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"max_new_tokens": 20})
    add_ckpt_flag(parser)
    parser.add_argument(
        "--prompt", nargs="+", type=utf8_text, default=list(PROMPTS), metavar="TEXT", help="what to go on from"
    )
    parser.add_argument("--n", type=positive_int, default=1, help="texts for each prompt")
    parser.add_argument("--max-new-tokens", type=positive_int, default=120, help="of each text")
    parser.add_argument("--temperature", type=non_negative_float, default=0.9, help="0: the likeliest token always")
    parser.add_argument(
        "--top-k", type=positive_int, default=40, help="draw from the k likeliest (as many as there are tokens: all)"
    )
    parser.add_argument("--top-p", type=positive_float, help="of these, from those that add up to p (default: all)")
    parser.add_argument("--no-cache", action="store_true", help="compute all positions anew for each token")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts on the terminal; an empty one ends")
    return parser


def main(argv=None) -> dict:
    """Write, or converse; returns the metrics (empty ones after a conversation)."""
    args = build_parser().parse_args(argv)
    if args.top_p is not None and args.top_p > 1:
        raise UserError(f"--top-p {args.top_p:g}: a probability, at most 1")
    device = pick_device(args.device)
    model, tokens, state = load_model(find_checkpoint(args), device)
    if args.interactive:
        converse(model, tokens, args)
        return {}
    run = start_run(args)
    seed_everything(args.seed)
    texts, drawn = [], 0
    for prompt in args.prompt:
        for text in answers(model, tokens, prompt, args):
            texts.append(text)
            drawn += args.max_new_tokens
            print(f"{text}\n", flush=True)
    write_texts(run.path("generated.txt"), texts)
    return run.finish(
        {
            "name": state["name"],
            "temperature": args.temperature,
            "top_k": args.top_k,
            "texts": len(texts),
            "tokens": drawn,
        }
    )


def answers(model: TransformerLM, tokens: Tokens, prompt: str, args: argparse.Namespace) -> list[str]:
    """`--n` texts that begin with the prompt, as the tokens keep it. An empty prompt begins where a text begins."""
    ids = tokens.encode(prompt).tolist()
    if len(ids) >= model.context:
        print(f"the prompt has {len(ids)} tokens: the model sees the last {model.context}", file=sys.stderr)
    start = torch.tensor([[tokens.start, *ids]] * args.n, device=next(model.parameters()).device)  # (n, T)
    cached = {"use_cache": not args.no_cache}
    found = model.generate(start, args.max_new_tokens, args.temperature, args.top_k, args.top_p, **cached)
    return [printable(tokens.decode(row[1:].tolist())) for row in found]


def converse(model: TransformerLM, tokens: Tokens, args: argparse.Namespace) -> None:
    """A prompt from the terminal, its answers, and again, until an empty line or the end of the input."""
    seed_everything(args.seed)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt.strip():
            return
        for text in answers(model, tokens, prompt, args):
            print(f"{text}\n", flush=True)


if __name__ == "__main__":
    run_main(main, build_parser)
