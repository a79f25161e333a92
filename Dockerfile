# The OpenAI-compatible server (docs/serving.md). It serves the model at /model, or the folder or Hub id given to `docker run`:
#
#     docker build --tag llava-hr .
#     docker run --gpus all --publish 127.0.0.1:8000:8000 --volume ./llava-hr-7b-sft-1024-hf:/model:ro llava-hr
#
# PyPI's torch brings its CUDA libraries, so the default base serves on NVIDIA GPUs as well. Another base needs Python 3.11.
ARG BASE=python:3.12-slim
FROM ${BASE}

# Address of an index with other builds of torch, such as those for CPUs (about 5 GB smaller); empty: PyPI
ARG TORCH_INDEX=
# What `--quantization bnb-4bit` needs is `serving,quantization`
ARG EXTRAS=serving
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1

# Before the code, so that a change of it does not install torch again
RUN python3 -m pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
WORKDIR /source
COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY modeling_llava_hr modeling_llava_hr
RUN python3 -m pip install --no-cache-dir ".[$EXTRAS]"

RUN useradd --create-home llava && install --directory --owner llava /home/llava/.cache/huggingface
USER llava
WORKDIR /home/llava

EXPOSE 8000
HEALTHCHECK --start-period=10m CMD python3 -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["python3", "-m", "modeling_llava_hr.integrations.serve", "--host", "0.0.0.0"]
CMD ["/model"]
