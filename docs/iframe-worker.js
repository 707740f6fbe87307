/* Opened from the disk, a browser starts no workers, which the search needs: an invisible frame takes their place. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      addEventListener("message", event => {
        if (event.source !== this.inside) return
        this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      this.ready = new Promise(loaded => {
        const inside = frame.contentDocument
        this.inside.postMessage = data => window.dispatchEvent(new MessageEvent("message", { data, source: this.inside }))
        this.inside.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => load(one)), Promise.resolve())
        const load = one => new Promise(done => {
          const script = inside.createElement("script")
          script.src = one
          script.onload = done
          inside.body.append(script)
        })
        load(url).then(loaded)
      })
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })))
    }
  }
}
