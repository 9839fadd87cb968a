"""Opens a page in Qt's browser and prints what has become of it: run by a Python that has PyQt6-WebEngine.

python qt_browser.py FILE WIDTH
"""

from __future__ import annotations

import os
import sys

# Read as Qt begins. Chromium's own sandbox doesn't start as root.
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication


def main(file: str, width: int) -> int:
    """Prints the document, its scripts having run; the exit status is 1 where it isn't loaded in two minutes."""
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(width, 900)
    view.show()

    def loaded(whole: bool) -> None:
        if whole:
            view.page().runJavaScript("document.documentElement.outerHTML", printed)
        else:
            application.exit(1)

    def printed(text: str) -> None:
        print(text)
        application.exit(0)

    view.loadFinished.connect(loaded)
    QTimer.singleShot(120_000, lambda: application.exit(1))
    view.load(QUrl.fromLocalFile(file))
    status: int = application.exec()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
