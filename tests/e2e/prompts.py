"""Prompts for the end-to-end tests: pieces of the standard library's source, the same on every machine of a release."""

import argparse
import ast
import bisect
import calendar
import collections
import csv
import dataclasses
import difflib
import fractions
import heapq
import inspect
import json.decoder
import pprint
import queue
import random
import shlex
import statistics
import string
import tarfile
import tempfile
import textwrap
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer

MODULES: tuple[ModuleType, ...] = (
    argparse, ast, bisect, calendar, collections, csv, dataclasses, difflib, fractions, heapq, inspect, json.decoder,
    pprint, queue, shlex, statistics, string, tarfile, tempfile, threading, zipfile,
)  # fmt: skip


def source(seed: int, characters: int) -> str:
    """Return a piece of source text of about ``characters``, cut at a line."""
    chooser = random.Random(seed)
    text = inspect.getsource(chooser.choice(MODULES))
    while len(text) < characters + 1000:
        text += "\n" + inspect.getsource(chooser.choice(MODULES))
    while True:
        start = text.index("\n", chooser.randrange(len(text) - characters - 200)) + 1
        piece = textwrap.dedent(text[start : start + characters])
        if piece.strip():
            return piece


def short_prompts(count: int, seed: int = 0) -> list[str]:
    """Return prompts of a line to some 300 tokens."""
    chooser = random.Random(seed)
    return [source(seed * 1000 + n, chooser.choice((12, 40, 90, 200, 400, 900))) for n in range(count)]


def encoded(model: str | Path, texts: Iterable[str]) -> list[list[int]]:
    """Return texts as token ids of a model."""
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    return [tokenizer.encode(text).ids for text in texts]
