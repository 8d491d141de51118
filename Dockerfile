# The consumer, and every other command, as an image:
#   docker build -t splitferry .
#   docker run --rm --shm-size 320m -v received:/data splitferry consume --root /data --bootstrap-servers HOST:PORT
# BASE is any image with Python 3.11 or newer and its venv module.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
COPY . /source
RUN python3 -m venv /opt/splitferry \
 && /opt/splitferry/bin/pip install --no-cache-dir '/source[otel,web]'

FROM ${BASE}
COPY --from=build /opt/splitferry /opt/splitferry
# A named volume mounted at /data takes over this owner.
RUN useradd --uid 10001 --create-home splitferry \
 && install --directory --owner=splitferry --group=splitferry --mode=0750 /data
USER splitferry
WORKDIR /home/splitferry
VOLUME /data
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/splitferry/bin/splitferry"]
CMD ["--help"]
