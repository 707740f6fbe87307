"""What the server has done, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter

from latentflow.studio.queue import DrawingQueue


class Counters:
    """Counts answers; used by the event loop alone."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def answered(self, task: str, status: int, seconds: float) -> None:
        """Count an answer and the time that it took."""
        self._answers[task, status] += 1
        self._seconds[task] += seconds

    def text(self, queue: DrawingQueue) -> str:
        """All counters, those of the queue included."""
        lines = ["# TYPE latentflow_requests_total counter"]
        for (task, status), count in sorted(self._answers.items()):
            lines.append(f'latentflow_requests_total{{task="{task}",status="{status}"}} {count}')
        lines.append("# TYPE latentflow_request_seconds_total counter")
        lines += [f'latentflow_request_seconds_total{{task="{t}"}} {s:.6f}' for t, s in sorted(self._seconds.items())]
        numbers = (
            ("images_drawn_total", "counter", queue.images_drawn),
            ("batches_drawn_total", "counter", queue.batches_drawn),
            ("drawing_seconds_total", "counter", round(queue.seconds_drawing, 6)),
            ("requests_waiting", "gauge", queue.waiting),
            ("up", "gauge", int(not queue.is_closed)),
        )
        for name, kind, value in numbers:
            lines += [f"# TYPE latentflow_{name} {kind}", f"latentflow_{name} {value}"]
        return "\n".join(lines) + "\n"
