"""What a run is given: the base model and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from scaleot_ray.config.settings import Settings


class ModelSettings(Settings):
    """The base model: its weights, its tokenizer, the type its tensors are loaded as."""

    path: str = Field(min_length=1, description="Hugging Face directory or id, or a .gguf file")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="type the weights are loaded as; build, eval and plug need the same"
    )
    tokenizer: str | None = Field(None, description="directory or id of the tokenizer; default: the model's own")
    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one; in a run, cuda is the GPU that an actor "
        "is given by owner_gpus or tenants.N.gpus",
    )
    licence: str | None = Field(
        None, description="licence notice for the artefact's card; default: what the model says"
    )

    def absolute(self) -> ModelSettings:
        """The same for a process with another working folder: existing paths in full."""
        tokenizer = absolute(self.tokenizer) if self.tokenizer is not None else None
        return self.model_copy(update={"path": absolute(self.path), "tokenizer": tokenizer})


class DataSettings(Settings):
    """A dataset and how its rows become tokens."""

    path: str = Field(
        min_length=1, description="a file, a folder of files, or a folder written by datasets.save_to_disk"
    )
    format: Literal["auto", "text", "jsonl", "parquet", "arrow", "csv", "tsv", "hf"] = Field(
        "auto", description="file format; auto goes by the file's ending; text takes each file as one document"
    )
    task: Literal["text", "completion", "choice", "chat"] = Field(
        "text",
        description="text: every token counts; completion: loss on the completion only; choice: one right answer "
        "among several; chat: messages through the tokenizer's template, loss on the assistant's turns",
    )
    split: str | None = Field(
        None, description="split of a dataset folder that holds several; all: every file of the folder"
    )
    text_column: str = Field("text", description="for text: the column of documents")
    prompt_column: str = Field("prompt", description="for completion and choice: the column of prompts")
    completion_column: str = Field("completion", description="for completion: the column of what is to be learned")
    messages_column: str = Field("messages", description="for chat: the column of lists of messages")
    choices_column: str = Field("choices", description="for choice: the column of lists of answers")
    label_column: str = Field(
        "label", description="for choice: the column of right answers: index from 0, text or letter"
    )
    prompt_template: str | None = Field(
        None, description="for choice and completion: the prompt, with {column} for a column's value"
    )
    choices: tuple[str, ...] | None = Field(
        None, description="for choice: the same answers for every row, in the order of the labels"
    )
    max_examples: int | None = Field(None, ge=1, description="use at most so many rows")

    def absolute(self) -> DataSettings:
        """The same for a process with another working folder: an existing path in full."""
        return self.model_copy(update={"path": absolute(self.path)})


def absolute(path: str) -> str:
    """A path in full where it leads to something; the rest are ids of models on a hub."""
    full = Path(path).expanduser()
    return str(full.absolute()) if full.exists() else path
