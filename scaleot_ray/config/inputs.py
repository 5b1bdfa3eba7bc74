"""What a run is given: the base model and datasets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scaleot_ray.config.settings import Settings


class ModelSettings(Settings):
    """The base model: its weights, its tokenizer, the type its tensors are loaded as."""

    path: str = Field(description="Hugging Face directory or id, or a .gguf file")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="type the weights are loaded as"
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


class DataSettings(Settings):
    """A dataset and how its rows become tokens."""

    path: str = Field(description="file, folder of files, or a folder written by datasets.save_to_disk")
    format: Literal["auto", "text", "jsonl", "parquet", "arrow", "hf"] = Field(
        "auto", description="file format; auto goes by the file's ending"
    )
    task: Literal["text", "completion", "choice", "chat"] = Field(
        "text",
        description="text: every token counts; completion: loss on the completion only; choice: one right answer "
        "among several; chat: messages through the tokenizer's template, loss on the assistant's turns",
    )
    split: str | None = Field(None, description="split of a dataset folder that holds several")
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    choices_column: str = "choices"
    label_column: str = Field("label", description="the right choice: its index from 0, its text or its letter")
    prompt_template: str | None = Field(
        None, description="for choice and completion: the prompt, with {column} for a column's value"
    )
    choices: tuple[str, ...] | None = Field(
        None, description="for choice: the same answers for every row, in the order of the labels"
    )
    max_examples: int | None = Field(None, ge=1, description="use at most so many rows")
