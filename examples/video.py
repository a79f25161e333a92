# SPDX-License-Identifier: Apache-2.0
"""
A question about a video, of which some frames are shown to the model as images:

    python -m examples.video film.mp4 --question "What happens?" --num_frames 8

A frame costs 144 tokens at `--size 384 --low_res_size 168`. No released checkpoint was trained on videos, or on
several images: this shows how to pass them, not that the answers are good.
"""

import argparse

from PIL import Image
from transformers import pipeline
from transformers.video_utils import load_video

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("video", help="file or URL")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--question", default="What happens in these images?")
    parser.add_argument("--num_frames", type=int, default=8, help="frames, evenly spaced")
    parser.add_argument("--size", type=int, default=384, help="side of a frame in pixels")
    parser.add_argument("--low_res_size", type=int, default=168, help="side of its low-resolution view in pixels")
    parser.add_argument("--unpad", action="store_true", help="drop the tokens of the padding")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()

    frames, metadata = load_video(arguments.video, num_frames=arguments.num_frames)
    images = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
    content = [*images, {"type": "text", "text": arguments.question}]
    sizes = {name: getattr(arguments, name) for name in ("size", "low_res_size", "unpad")}

    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    options = {"max_new_tokens": arguments.max_new_tokens, "return_full_text": False, "processor_kwargs": sizes}
    output = pipe([{"role": "user", "content": content}], **options)
    seconds = [f"{index / metadata.fps:.1f}" for index in metadata.frames_indices]
    print(f"frames at {', '.join(seconds)} s: {output[0]['generated_text'].strip()}")


if __name__ == "__main__":
    run_command(main)
