"""Kafka's own command-line tools, as the documents call them."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

import platformdirs

from splitferry_cli.kafka_jars import KAFKA_VERSION, java, kafka_jars

_TOOLS = {
    "kafka-configs.sh": "kafka.admin.ConfigCommand",
    "kafka-consumer-groups.sh": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "kafka-topics.sh": "org.apache.kafka.tools.TopicCommand",
}
_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Dorg.slf4j.simpleLogger.defaultLogLevel=error"


def put_kafka_tools(directory: Path) -> None:
    """Write the scripts into `directory`, for a PATH."""
    jars = [_tools_jar(), *kafka_jars()]
    begin = f"exec {java()} {_JVM} -cp {shlex.quote(os.pathsep.join(map(str, jars)))}"
    for name, entry in _TOOLS.items():
        script = directory / name
        script.write_text(f'#!/bin/sh\n{begin} {entry} "$@"\n')
        script.chmod(0o755)


def _tools_jar() -> Path:
    """Not one of the broker's; fetched once and kept, as those are."""
    from jgo.maven import MavenContext, PythonResolver
    from jgo.parse import Coordinate

    cache = Path(platformdirs.user_cache_dir("splitferry", appauthor=False))
    kept = cache / f"kafka-tools-{KAFKA_VERSION}.jar"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            context = MavenContext(resolver=PythonResolver(), repo_cache=Path(scratch), timeout=30)
            wanted = Coordinate("org.apache.kafka", "kafka-tools", KAFKA_VERSION, scope="compile")
            context.create_dependency(wanted).artifact.resolve().rename(kept)
    return kept
