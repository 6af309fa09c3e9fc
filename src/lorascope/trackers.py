"""STUB, replaced at the merge."""


class Trackers:
    def log(self, *a):
        pass

    def log_image(self, *a):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass


def open_trackers(*a):
    return Trackers()
