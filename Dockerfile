# World2Filter on an NVIDIA GPU, or on a CPU. PyTorch's wheels bring CUDA's libraries, so the base
# is the smallest CUDA image: what it adds is what the container toolkit asks of the host's driver.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# EGL is what MuJoCo renders with; Mesa's is for machines without a GPU. The compiler and Python's
# headers are for torch.compile.
# hadolint ignore=DL3008  # the distribution's newest: security fixes matter more than the number
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 python3-venv python3-dev gcc g++ make git \
      libegl1 libgl1 libgles2 libegl-mesa0 \
    && rm -rf /var/lib/apt/lists/*

# glvnd finds a vendor's EGL by this file, which the container toolkit doesn't bring everywhere.
# Without the library that it names, on a CPU, it is passed over.
RUN mkdir -p /usr/share/glvnd/egl_vendor.d \
    && printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}\n' \
      > /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# The user who runs everything; build with your own ids, so that runs/ in the mounted project is
# yours. Ubuntu's image has a user with the id 1000 already.
ARG UID=1000
ARG GID=1000
RUN if id ubuntu >/dev/null 2>&1; then userdel --remove ubuntu; fi \
    && groupadd --gid "$GID" w2f \
    && useradd --uid "$UID" --gid "$GID" --create-home --shell /bin/bash w2f \
    && mkdir -p /project /opt/venv /home/w2f/.cache \
    && chown "$UID:$GID" /project /opt/venv /home/w2f/.cache
USER $UID
WORKDIR /project

# The locked packages first: they change seldom, and are by far the largest layer. locked.txt
# leaves out sam3, wandb, TensorBoard and SLURM's launcher.
ARG LOCK=locked-extras.txt
ENV UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1
COPY --chown=w2f requirements/ requirements/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir "$(grep '^uv==' "requirements/$LOCK")" \
    && /opt/venv/bin/uv pip install --python /opt/venv/bin/python --no-deps -r "requirements/$LOCK"
ENV PATH=/opt/venv/bin:$PATH

# The project itself, editable: a checkout that is mounted over /project takes its place.
COPY --chown=w2f . .
RUN uv pip install --python /opt/venv/bin/python --no-deps --no-build-isolation --editable .

ENV MUJOCO_GL=egl \
    OMP_WAIT_POLICY=passive \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
CMD ["bash"]
